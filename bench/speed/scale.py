"""Many workers on paper and in simulation: bytes on the wire, update time, memory; and what stragglers and failures
cost.

    python -m bench.speed.scale [--json bench/results/scale.json]

On the wire (a generation's bytes, counted on objects that are really built and pickled): a member's line of QUESTIONS
questions and answers, as torchrun's ranks gather it from each other and as a Ray actor returns it to the driver; the N
coefficients that the driver sends to every worker. Beside them what es-at-scale sends: all weights, 2 bytes a
parameter, to every worker. LINK, the speed at which a worker receives them, is an ASSUMPTION: one port of 200 Gb/s
each, nothing shared.

Update times are N normals a parameter, at two unit costs: of a CPU as measured (kernels-cpu.json), and of an H200 as
PREDICTED from counted instructions (static_analysis.json by gpus.py). No GPU has been measured. A worker of T GPUs that
split every tensor evenly takes 1 / T of it. Memory is that of live weights in bf16 and theta. N is 30 or, beyond that,
MEMBERS (or 1) a worker.

The simulation is of discrete events around workers.dispatch.Dispatch, the very class that hands out members in a run.
What it ASSUMES is in SIMULATED. A straggler is a member on a machine that is slow for once: elsewhere the same member
takes its usual time (against answers that are long in themselves nothing helps). That a pool replaces a worker three
limits late is left out. It says how policies compare under these assumptions, not how long a run takes.
"""

import argparse
import heapq
import itertools
import json
import math
import pathlib
import pickle
import random

from bench import RESULTS
from bench.common import shapes
from es_finetune.engines import Answer
from es_finetune.evaluation.evaluator import Evaluation
from es_finetune.monitor.rows import member_line
from es_finetune.optim.update import Update
from es_finetune.runs.files import write_atomically
from es_finetune.tasks import Score
from es_finetune.workers.dispatch import Dispatch

MODELS = ("Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-7B", "Llama-3.1-8B", "Llama-3.1-70B")
WORKERS = (1, 8, 64, 256, 1024)
MEMBERS = 4  # a worker; with 1 a shared counter has nothing to balance
POPULATION = 30  # at least
QUESTIONS = 200
LINK = 25e9
MASTERS = {"fp32": 6, "copy": 4, "none": 2}  # bytes a bf16 parameter: live weights and theta
SHARDS = (1, 2, 4, 8)
SIMULATED = {
    "model": "Qwen2.5-7B",  # of which the predicted update is
    "generations": 200,
    "seconds": 60.0,  # the median member
    "spread": 0.1,  # standard deviation of its logarithm
    "stragglers": 0.01,  # share of members that take
    "straggle": 5.0,  # times as long
    "hours_between_failures": 100.0,  # of one worker, busy or not; 0: never
    "replaced_after": 120.0,  # seconds until a new worker has loaded the model; then it repeats the log's updates
    "snapshot_every": 0,  # generations; the new worker repeats only those since. 0, as a run by default: all
    "limit": 180.0,  # seconds until a member is given to another worker too, or dropped
}
POLICIES = ("waves", "shared counter", "re-issued", "dropped")
# What else could be assumed, with VARIED workers: (what, members a worker, changes).
VARIED = 64
VARIATIONS = (
    ("1 member a worker", 1, {}),
    ("16 members a worker", 16, {}),
    ("no stragglers", MEMBERS, {"stragglers": 0.0}),
    ("2% of members 10 times as long", MEMBERS, {"stragglers": 0.02, "straggle": 10.0}),
    ("no deaths", MEMBERS, {"hours_between_failures": 0.0}),
    ("a death every 5 hours of a worker", MEMBERS, {"hours_between_failures": 5.0}),
    ("the same, a snapshot every 10 generations", MEMBERS, {"hours_between_failures": 5.0, "snapshot_every": 10}),
)


def population(workers, members=MEMBERS):
    return max(POPULATION, members * workers)


# ---- on paper ----


def line(member=0):
    """What a member sends back."""
    draws = random.Random(member)
    answers = QUESTIONS * [Answer("some text", tuple(range(1024)))]
    scores = [Score(draws.random(), exact=float(draws.random() < 0.5), format=1.0) for _ in range(QUESTIONS)]
    return member_line(123, member, Evaluation(answers, scores, 12.3456789, 0.0123456789))


def wire(workers, members):
    """One generation's bytes. torchrun: what each rank receives, the lists of lines of all others, which the gather
    pads to the longest. Ray: what the driver receives, and what each worker does."""
    n = population(workers, members)
    lines = list(map(line, range(-(-n // workers))))
    update = Update(123, tuple(random.Random(0).gauss(0, 1) for _ in range(n)), n, 0.123456789)
    return {
        "workers": workers,
        "members_a_worker": members,
        "population": n,
        "torchrun_rank_receives": (workers - 1) * len(pickle.dumps(lines)),
        "ray_driver_receives": n * len(pickle.dumps(lines[0])),
        "ray_worker_receives": len(pickle.dumps(update)),
    }


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


def on_paper(model):
    """Memory, an update's seconds for every population of the tables, and what sending the weights instead would
    take."""
    costs, values = unit_costs(), parameters(model)
    populations = sorted({population(workers, members) for workers in WORKERS for members in (1, MEMBERS)})
    return {
        "model": model,
        "parameters": values,
        "memory_bytes": {master: values * size for master, size in MASTERS.items()},
        "weights_bytes": 2 * values,
        "weights_seconds": 2 * values / LINK,
        "update_seconds_cpu": {n: values * n * costs["cpu"] for n in populations},
        "update_seconds_h200_predicted": {
            shards: {n: values * n * costs["h200_predicted"] / shards for n in populations} for shards in SHARDS
        },
    }


# ---- in simulation ----


class Waves(Dispatch):
    """What the reference does: as many members at once as there are workers, and the next ones when the slowest is
    done. Kinder than the reference to those of a worker that dies: they go out with the next wave."""

    began = None

    def next(self, worker, now):
        if not self.out:
            self.began = now
        return super().next(worker, now) if now == self.began else None


def handing_out(policy, members, limit):
    if policy == "waves":
        return Waves(range(members))
    return Dispatch(range(members), limit if policy in ("re-issued", "dropped") else None, policy == "dropped")


def drawn(draws, members, s):
    """(usual seconds, whether it straggles when it first goes out) of each member of a generation."""
    return [
        (s["seconds"] * math.exp(draws.gauss(0, s["spread"])), draws.random() < s["stragglers"]) for _ in range(members)
    ]


def simulate(policy, workers, members, update, seed=0, **changed):
    """What becomes of a run whose update takes `update` seconds, as shares of all workers' time: `efficiency`, the
    usual time of the members that counted; `wasted`, work of which no result counted. And how many members were
    dropped, handed out more than once, how many workers died; `wall` seconds.

    A generation ends with an update by all who are free. Who is late with a member, or new, repeats the updates it has
    missed before its next member."""
    s = SIMULATED | changed
    draws = random.Random(f"{seed} {workers} {members}")  # the same members for every policy
    lives = [random.Random(f"{seed} worker {worker}") for worker in range(workers)]
    hours = s["hours_between_failures"]
    deaths = [(life.expovariate(1 / (3600 * hours)), worker) for worker, life in enumerate(lives)] if hours else []
    heapq.heapify(deaths)
    idle = list(range(workers))
    jobs = [None] * workers  # (generation, member, since, its usual seconds)
    done = [0] * workers  # updates
    incarnation = [0] * workers
    # (when, order, worker that is free then, its incarnation); worker None: a member is late
    events, order = [], itertools.count()
    now = useful = wasted = 0.0
    dropped = repeated = 0

    def at(when, worker):
        heapq.heappush(events, (when, next(order), worker, worker is not None and incarnation[worker]))

    for generation in range(s["generations"]):
        times, started, alarm = drawn(draws, members, s), set(), None
        dispatch = handing_out(policy, members, s["limit"])
        while True:
            dispatch.give_up(now)
            while idle and (member := dispatch.next(idle[-1], now)) is not None:
                worker = idle.pop()
                seconds, straggles = times[member]
                jobs[worker] = generation, member, now, seconds
                at(now + seconds * (s["straggle"] if straggles and member not in started else 1), worker)
                repeated += member in started
                started.add(member)
            if dispatch.finished:
                break
            due = dispatch.overdue() if idle or dispatch.drop else None
            if due is not None and due != alarm:
                alarm = due
                at(math.nextafter(due, math.inf), None)

            if deaths and deaths[0][0] < events[0][0]:
                when, worker = heapq.heappop(deaths)
                back = when + s["replaced_after"]
                heapq.heappush(deaths, (back + lives[worker].expovariate(1 / (3600 * hours)), worker))
                incarnation[worker] += 1
                done[worker] = generation - generation % s["snapshot_every"] if s["snapshot_every"] else 0
                dispatch.lost(worker)
                if jobs[worker]:
                    wasted += when - jobs[worker][2]
                    jobs[worker] = None
                elif worker in idle:
                    idle.remove(worker)
                at(back, worker)
                now = max(now, when)
                continue
            when, _, worker, of = heapq.heappop(events)
            now = max(now, when)
            if worker is None or of != incarnation[worker]:
                continue
            if jobs[worker]:
                began, member, since, seconds = jobs[worker]
                jobs[worker] = None
                if began == generation and dispatch.done(member):
                    useful += seconds
                else:
                    wasted += when - since
            if done[worker] < generation:
                at(when + (generation - done[worker]) * update, worker)
                done[worker] = generation
            else:
                idle.append(worker)
        dropped += len(dispatch.dropped)
        for worker in idle:
            done[worker] = generation + 1
        now += update
    total = workers * now
    figures = {
        "efficiency": useful / total,
        "wasted": wasted / total,
        "dropped": dropped,
        "repeated": repeated,
        "deaths": sum(incarnation),
    }
    return {"policy": policy, "workers": workers, "population": members, "update": update, **figures, "wall": now}


def simulated(policy, workers, members=MEMBERS, **changed):
    """With the update that is predicted for the model and population."""
    n = population(workers, members)
    return simulate(policy, workers, n, parameters(SIMULATED["model"]) * n * unit_costs()["h200_predicted"], **changed)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=pathlib.Path, default=RESULTS / "scale.json")
    args = parser.parse_args()
    rows = [simulated(policy, workers) for workers in WORKERS if workers > 1 for policy in POLICIES]
    varied = [
        {"what": what, **simulated(policy, VARIED, members, **changed)}
        for what, members, changed in VARIATIONS
        for policy in POLICIES
    ]
    for row in rows + varied:
        shares = f"efficiency {row['efficiency']:.3f}, wasted {row['wasted']:.3f}"
        print(f"{row['workers']:5} {row['population']:5} {row['policy']:15} {shares} {row.get('what', '')}")
    costs = unit_costs()
    report = {
        "assumed": {"members_a_worker": MEMBERS, "questions": QUESTIONS, "link_bytes_a_second": LINK, **SIMULATED},
        "unit_costs": costs,
        "line_bytes": len(pickle.dumps(line())),
        "members_whose_update_takes_as_long_as_the_link": 2 / LINK / costs["h200_predicted"],
        "wire": [wire(workers, members) for workers in WORKERS if workers > 1 for members in (1, MEMBERS)],
        "paper": [on_paper(model) for model in MODELS],
        "simulated": rows,
        "varied": varied,
    }
    write_atomically(args.json, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
