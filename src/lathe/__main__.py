import importlib
import sys

try:
    from lathe.cli import main
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] == "lathe":
        raise
    if sys.argv[1:2] != ["doctor"]:
        sys.exit(f"error: {error}; run `make setup`; `python -m lathe doctor` tells what else is missing")
    from lathe import doctor

    sys.exit(doctor.run(lambda: importlib.import_module("lathe.config.params").load(), as_json="--json" in sys.argv))

main()
