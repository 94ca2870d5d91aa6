"""Contract under test: the names that options can have are offered without what they name. Checking a command line
imports neither torch nor transformers."""

import subprocess
import sys


def test_the_names_of_options_cost_no_heavy_import():
    script = (
        "import sys\n"
        "from es_finetune.engines import DECODINGS\n"
        "from es_finetune.models import WEIGHT_DTYPES\n"
        "from es_finetune.tasks import NAMES\n"
        "import es_finetune.config\n"
        "assert all((DECODINGS, WEIGHT_DTYPES, NAMES))\n"
        "print(sorted({'torch', 'numpy', 'transformers', 'datasets'} & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
