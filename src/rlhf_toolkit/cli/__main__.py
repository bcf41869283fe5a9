"""``python -m rlhf_toolkit.cli``."""

from __future__ import annotations

from rlhf_toolkit.cli import main

if __name__ == "__main__":
    main()
