"""`dvc` as the tests' checkouts run it: DVC itself, which reads and writes its files as `lathe repro` has it do.

No module of Lathe is imported by its name: a checkout of a test has its own.
"""

import importlib.util
import sys
from pathlib import Path

FILE = Path(__file__).parents[1] / "src/lathe/common/dvc_yaml.py"

if __name__ == "__main__":
    sys.path.pop(0)  # the folder of this file: no module of the tests can be imported by accident
    sys.argv[0] = "dvc"
    spec = importlib.util.spec_from_file_location("dvc_yaml", FILE)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.use_libyaml()
    from dvc.cli import main

    sys.exit(main())
