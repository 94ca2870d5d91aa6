"""Contract under test: the names that options can have are offered without what they name. Checking a command line
imports neither torch nor transformers. No module takes a name from the package itself, by which it could import from a
layer above it unseen by import-linter: the package loads its names on demand."""

import ast
import subprocess
import sys
from pathlib import Path

import es_finetune


def test_names_and_checks_of_options_cost_no_heavy_import():
    script = (
        "import sys\n"
        "from es_finetune.engines import DECODINGS\n"
        "from es_finetune.models import WEIGHT_DTYPES\n"
        "from es_finetune.tasks import NAMES\n"
        "from es_finetune.config import TrainConfig\n"
        "from es_finetune.errors import UserError\n"
        "TrainConfig()\n"
        "try:\n"
        "    TrainConfig(population=3, antithetic=True)\n"
        "except UserError as error:\n"
        "    assert 'population must be even' in str(error)\n"
        "else:\n"
        "    raise AssertionError\n"
        "assert all((DECODINGS, WEIGHT_DTYPES, NAMES))\n"
        "print(sorted({'torch', 'numpy', 'transformers', 'datasets'} & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_no_module_takes_a_public_name_from_the_package():
    root = Path(es_finetune.__file__).parent
    taken = {
        (str(path.relative_to(root)), name.name)
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module == "es_finetune" and not node.level
        for name in node.names
        if name.name in es_finetune.__all__
    }
    assert not taken
