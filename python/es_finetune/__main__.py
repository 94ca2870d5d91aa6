"""Where a command starts: `python -m es_finetune` and the script `es-finetune`."""

import sys


def main() -> int:
    try:
        from es_finetune import cli  # not above: Ctrl-C may come while it is imported

        return cli.main()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
