"""What the subcommands do; each takes the parsed options and returns an exit code or None."""

from sivae.commands.exchange import export, import_
from sivae.commands.judging import evaluate, ood
from sivae.commands.latents import attribute, encode, neighbours
from sivae.commands.pictures import interpolate, reconstruct, sample, stylemix, translate, traverse
from sivae.commands.sets import check, index, pack
from sivae.commands.training import doctor, plan, toy2d, train

COMMANDS = {
    "train": train, "toy2d": toy2d, "pack": pack, "check": check, "index": index, "sample": sample, "reconstruct": reconstruct,
    "interpolate": interpolate, "traverse": traverse, "stylemix": stylemix, "encode": encode, "neighbours": neighbours,
    "attribute": attribute, "translate": translate, "evaluate": evaluate, "ood": ood, "import": import_, "export": export, "plan": plan, "doctor": doctor,
}  # fmt: skip
