"""Makes the trained run that comes with the repository from a run folder. By hand:

    rm -r .github/pretrained/world
    python tests/export_run.py RUN .github/pretrained/world
    python evaluate.py .github/pretrained/world

Keeps what evaluate.py reads: first stage, token encoder and the U-Net's average, in half precision,
and run.json without folders.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train  # noqa: E402

FOLDERS = {"data": "", "cache": "", "out": "", "vae": ""}


def export(run, out):
    out.mkdir(parents=True, exist_ok=True)
    for file, names in (("vae.pt", ("vae",)), ("model.pt", ("encoder", "ema"))):
        contents = train.load_checkpoint(run / file)
        kept = {key: contents[key] for key in ("step", "seconds")}
        kept["config"] = {**contents["config"], **FOLDERS}
        for name in names:
            weights = contents[name]
            kept[name] = {k: w.half() if w.is_floating_point() else w for k, w in weights.items()}
        if file == "vae.pt":  # for train.py --vae, which takes no step with it
            groups = contents["optimizer"]["param_groups"]
            kept["optimizer"] = {"state": {}, "param_groups": groups}
        torch.save(kept, out / file)
    facts = train.read_run(run)
    facts["config"].update(FOLDERS)
    train.write_json(out / "run.json", facts)


if __name__ == "__main__":
    export(Path(sys.argv[1]), Path(sys.argv[2]))
