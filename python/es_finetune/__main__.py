import sys

from es_finetune.cli import main

sys.exit(main())
