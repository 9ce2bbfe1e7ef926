"""A line of log.jsonl: flat, so that pandas.read_json(path, lines=True) makes one table of it; nested in memory."""

import time

INSIDE = ("watch", "drift")  # dicts in a line; "watch.sgp" in the file


def flat(line):
    """A line, a dict, as it is written: without dicts and lists, and with the time, in seconds since 1970."""
    found = {"step": line["step"], "timestamp": round(time.time(), 3)}
    for name, value in line.items():
        if name in INSIDE:
            found |= {f"{name}.{inner}": number for inner, number in value.items()}
        elif name == "hacking":
            found[name] = "; ".join(value)
        else:
            found[name] = value
    return found


def nested(line):
    """The reverse of `flat`. A line that an earlier version wrote nested stays as it is."""
    found = {}
    for name, value in line.items():
        outer, dot, inner = name.partition(".")
        if dot and outer in INSIDE:
            found.setdefault(outer, {})[inner] = value
        elif name == "hacking" and isinstance(value, str):
            found[name] = value.split("; ") if value else []
        else:
            found[name] = value
    return found
