"""What settings and measures are called in tables and figures."""

from typing import Any

ROUNDING = 1e-15  # of the error of a function that is the true one
MEASURES = {
    "l2": "regression error",
    "d1_1": "D_1,1",
    "d1_2": "D_1,2",
    "d2": "D_2",
    "d3": "D_3",
    "key_alone": "keys alone in their cells",
    "value_alone": "values alone in their cells",
    "key_crowd": "keys that share a cell",
    "value_crowd": "values that share a cell",
}


def title(setting: dict[str, Any]) -> str:
    config = setting["config"]
    if config["kind"] == "attention":
        return f"{config['share']}, {config['planted']}"
    inner = f", inner {config['inner']}" if config["inner"] else ""
    design = ", uniform X" if config["design"] == "uniform" else ""
    return f"{config['family']}, d {config['d']}, {config['atoms']} atoms{inner}{design}"
