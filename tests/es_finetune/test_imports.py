"""Contract under test: the names that options can have are offered without what they name. Checking a command line
imports neither torch nor transformers."""

import subprocess
import sys


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
