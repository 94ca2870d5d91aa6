"""Many workers on paper and in simulation: bytes on the wire, update time, memory; and what stragglers and failures cost.

    python bench/scale.py [--json bench/results/scale.json]

Bytes are counted on objects that are really built: a member's line of 200 questions as torchrun's ranks gather it and as a Ray actor returns it (pickled),
and the N coefficients that a Ray driver sends back. Beside them: all weights, 2 bytes a parameter, to every worker once a generation, as es-at-scale does.

Bytes are those that one worker receives in a generation. Update times are N normals a parameter at a unit cost: of this machine's CPU as measured (kernels-cpu.json), and of an H200 as PREDICTED from counted instructions
(static_analysis.json; no GPU has been measured). Sending weights is at LINK bytes a second, an assumption: one 200 Gb/s port, every worker at once.

The simulation is of discrete events around workers.dispatch.Dispatch, the very class that hands out members in a run. What it assumes is in SIMULATED: how
long members take, how often they straggle, how often workers die. It says how policies compare under these, not how long a run takes.
"""

import argparse
import heapq
import itertools
import json
import math
import pathlib
import pickle
import random

import shapes
from es_finetune.evaluate import Evaluation
from es_finetune.files import write_atomically
from es_finetune.metrics import member_line
from es_finetune.optimizer import Update
from es_finetune.tasks import Score
from es_finetune.workers.dispatch import Dispatch

RESULTS = pathlib.Path(__file__).parent / "results"
MODELS = ("Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-7B", "Llama-3.1-8B", "Llama-3.1-70B")
WORKERS = (1, 8, 64, 256, 1024)
MEMBERS = 4  # a worker: with fewer a shared counter has nothing to balance
POPULATION = 30  # at least
QUESTIONS = 200
LINK = 25e9
BASES = {"fp32": 6, "copy": 4, "none": 2}  # bytes a bf16 parameter: live weights and theta
SIMULATED = {
    "generations": 20,
    "seconds": 60.0,  # the median member
    "spread": 0.1,  # standard deviation of its logarithm
    "stragglers": 0.01,  # share of members that take
    "straggle": 5.0,  # times as long
    "hours_between_failures": 100.0,  # of one worker
    "replaced_after": 120.0,  # seconds until a new worker has loaded the model
    "update": 1.0,  # seconds; a new worker repeats the updates of the log
    "limit": 180.0,  # seconds until a member is given to another worker too, or dropped
}
POLICIES = {"waves": {}, "shared counter": {}, "re-issued": {"limit": True}, "dropped": {"limit": True, "drop": True}}


def population(workers):
    return max(POPULATION, MEMBERS * workers)


# --- on paper -------------------------------------------------------------------------------------------------------------


def line_bytes():
    """What a member of QUESTIONS questions sends back."""
    draws = random.Random(0)
    scores = [Score(draws.random(), exact=float(draws.random() < 0.5), format=1.0) for _ in range(QUESTIONS)]
    return len(pickle.dumps(member_line(123, 17, Evaluation([], scores, 12.3456789, 0.0123456789))))


def update_bytes(members):
    return len(pickle.dumps(Update(123, 0.123456789, members, tuple(random.Random(0).gauss(0, 1) for _ in range(members)))))


def received(workers):
    """Bytes that one worker receives in a generation: under torchrun every rank gets the lines of all the others' members; in a Ray pool the driver gets
    them all, and a worker the coefficients."""
    n = population(workers)
    return {"torchrun": n * (workers - 1) // workers * line_bytes(), "ray": update_bytes(n), "ray_driver": n * line_bytes()}


def parameters(model):
    return sum(map(math.prod, shapes.parameter_shapes(model).values()))


def unit_costs():
    """Seconds a normal, of an update."""
    calls = json.loads((RESULTS / "kernels-cpu.json").read_text())["calls"]
    rows = [r for r in calls if r["operation"] == "update f32 in place, 30 seeds"]
    best = min(rows, key=lambda r: r["seconds"] / r["elements"])
    predicted = next(
        r["predicted"]
        for r in json.loads((RESULTS / "static_analysis.json").read_text())["predictions"]
        if (r["gpu"], r["kernel"]) == ("H200 SXM", "update")
    )
    return {
        "cpu": best["seconds"] / best["elements"] / best["seeds"],
        "cpu_threads": best["threads"],
        "h200_predicted": 1 / predicted["normals_per_s"],
    }


def on_paper():
    """One row for each model and number of workers."""
    costs = unit_costs()
    rows = []
    for model, workers in itertools.product(MODELS, WORKERS):
        values, n = parameters(model), population(workers)
        row = {"model": model, "parameters": values, "workers": workers, "population": n, "received_bytes": received(workers)}
        row |= {"weights_bytes": 2 * values, "weights_seconds": 2 * values / LINK}
        row |= {"update_seconds_cpu": values * n * costs["cpu"], "update_seconds_h200_predicted": values * n * costs["h200_predicted"]}
        rows.append(row | {"memory_bytes": {base: values * size for base, size in BASES.items()}})
    return rows


# --- in simulation --------------------------------------------------------------------------------------------------------


def simulate(policy, workers, members, seed=0, **changed):
    """{efficiency, dropped, repeated, failures, wall} of a run. efficiency: the time of the members that count over the time of all workers.

    "waves": rounds of as many members as there are workers, each as long as its slowest. The others: Dispatch. In all of them a generation begins when
    the last one's update is done everywhere, and a member that was with a worker that dies begins anew."""
    s = SIMULATED | changed
    draws = random.Random(f"{seed} {workers} {members}")  # alike for all policies
    now = useful = 0.0
    dropped = repeated = failures = 0
    back = dict.fromkeys(range(workers), 0.0)  # when a worker that died is there again
    for generation in range(s["generations"]):
        times = [
            s["seconds"] * math.exp(draws.gauss(0, s["spread"])) * (s["straggle"] if draws.random() < s["stragglers"] else 1) for _ in range(members)
        ]
        again = [s["seconds"] * math.exp(draws.gauss(0, s["spread"])) for _ in range(members)]  # elsewhere the same member is no straggler
        deaths = [draws.expovariate(1 / (3600 * s["hours_between_failures"])) if s["hours_between_failures"] else math.inf for _ in range(workers)]
        catch_up = s["replaced_after"] + generation * s["update"]
        run = _waves if policy == "waves" else _dispatched
        options = {"limit": s["limit"] if POLICIES[policy].get("limit") else None, "drop": POLICIES[policy].get("drop", False)}
        found = run(times, again, {w: now + d for w, d in enumerate(deaths)}, back, now, catch_up, **({} if policy == "waves" else options))
        now = found["end"] + s["update"]
        useful += found["useful"]
        dropped, repeated, failures = dropped + found["dropped"], repeated + found["repeated"], failures + found["failures"]
    found = {"efficiency": useful / (workers * now), "dropped": dropped, "repeated": repeated, "failures": failures}
    return {"policy": policy, "workers": workers, "population": members, **found, "wall": now}


def _waves(times, again, deaths, back, now, catch_up):
    """In a wave a worker that dies holds everybody up until it is back and has begun anew."""
    failures, useful, workers = 0, 0.0, len(deaths)
    for start in range(0, len(times), workers):
        ends = []
        for worker, seconds in enumerate(times[start : start + workers]):
            begin = max(now, back[worker])
            if begin <= deaths[worker] < begin + seconds:
                back[worker] = begin = deaths[worker] + catch_up
                deaths[worker] = math.inf
                failures += 1
            useful += seconds
            ends.append(begin + seconds)
        now = max(ends)
    return {"end": now, "useful": useful, "dropped": 0, "repeated": 0, "failures": failures}


def _dispatched(times, again, deaths, back, now, catch_up, limit, drop):
    dispatch = Dispatch(range(len(times)), limit, drop)
    taken, started, useful, failures, repeated = {}, set(), 0.0, 0, 0
    events = []  # (when, order, what, worker)
    order = itertools.count()
    idle, serving = set(), dict.fromkeys(deaths)  # worker -> (member, end) that it is at

    def add(when, what, worker):
        heapq.heappush(events, (when, next(order), what, worker))

    for worker in deaths:
        add(max(now, back[worker]), "free", worker)
        if deaths[worker] < math.inf:
            add(deaths[worker], "dies", worker)
    woken = None
    while not dispatch.finished:
        when, _, what, worker = heapq.heappop(events)
        now = max(now, when)
        if what == "dies":
            if now < back[worker]:
                continue  # it is not there
            failures += 1
            dispatch.lost(worker)
            serving[worker] = None
            idle.discard(worker)
            back[worker] = now + catch_up
            add(back[worker], "free", worker)
        elif what == "done":
            if serving[worker] is None or serving[worker][1] != when:
                continue  # of before it died
            member, _ = serving[worker]
            serving[worker] = None
            if dispatch.done(worker, member):
                useful += taken[member, worker]
            idle.add(worker)
        elif what == "free" and serving[worker] is None:
            idle.add(worker)
        dispatch.give_up(now)
        for worker in sorted(idle):
            member = dispatch.next(worker, now)
            if member is None:
                break
            idle.discard(worker)
            begun = member in started
            started.add(member)
            repeated += begun
            taken[member, worker] = seconds = again[member] if begun else times[member]
            serving[worker] = member, now + seconds
            add(now + seconds, "done", worker)
        due = dispatch.overdue()
        if due is not None and due != woken and (idle or drop) and not dispatch.waiting:
            woken = due
            add(due + 1e-6, "late", None)
    # What still runs is of no use, but its worker is busy with it.
    for worker, job in serving.items():
        if job is not None:
            back[worker] = max(back[worker], job[1])
    return {"end": now, "useful": useful, "dropped": len(dispatch.dropped), "repeated": repeated, "failures": failures}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=pathlib.Path, default=RESULTS / "scale.json")
    args = parser.parse_args()
    simulated = [simulate(policy, workers, population(workers)) for workers in WORKERS if workers > 1 for policy in POLICIES]
    for row in simulated:
        print(
            f"{row['workers']:5} {row['policy']:15} efficiency {row['efficiency']:.3f}, {row['dropped']} dropped, {row['repeated']} repeated, {row['failures']} failures"
        )
    assumed = {"members_a_worker": MEMBERS, "questions": QUESTIONS, "link_bytes_a_second": LINK, **SIMULATED}
    report = {"assumed": assumed, "unit_costs": unit_costs(), "line_bytes": line_bytes(), "paper": on_paper(), "simulated": simulated}
    write_atomically(args.json, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
