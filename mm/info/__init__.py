"""`mm info`: what a model costs, from its config alone. Nothing is allocated: it is built on the meta device.

mm info configs/decoder/deepseek_v3.yaml --context 8192
mm info runs/demo/model --json
"""

from mm.info.command import count, main, render, size
from mm.info.counting import HOW_COUNTED, KEYS, Info, Part, describe
from mm.info.source import build_meta

__all__ = ["HOW_COUNTED", "KEYS", "Info", "Part", "build_meta", "count", "describe", "main", "render", "size"]
