r"""What two statements are compared by: their tokens, which survive re-typesetting, and the numbers they name."""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

DRAWING = re.compile(r"\[asy\].*?(?:\[/asy\]|\Z)|\\begin\{(asy|tikzpicture)\}.*?(?:\\end\{\1\}|\Z)", re.DOTALL)
# What a command means where its name is not what counts; a command that is not here is a word.
_SILENT = (
    "left right big bigg Big Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr displaystyle textstyle limits quad "
    "qquad mbox text textbf textit textrm texttt textsc mathrm mathbf mathbb mathcal mathit mathsf mathrsfs mathop "
    "boldsymbol operatorname overline overrightarrow vec bar item rm bf it cal emph begin end hspace label"
)
_SYNONYMS = {
    **dict.fromkeys(_SILENT.split(), " "),
    **dict.fromkeys(("dfrac", "tfrac", "cfrac", "over"), " frac "),
    **dict.fromkeys(("le", "leq", "leqslant"), " <= "),
    **dict.fromkeys(("ge", "geq", "geqslant"), " >= "),
    **dict.fromkeys(("ne", "neq"), " != "),
    **dict.fromkeys(("dots", "ldots", "cdots", "dotsc", "dotsb", "dotsm", "vdots", "ddots"), " "),
    **dict.fromkeys(("cdot", "times", "ast"), " * "),
    **dict.fromkeys(("circ", "degree"), " degrees "),
    **dict.fromkeys(("to", "rightarrow", "longrightarrow"), " -> "),
    **dict.fromkeys(("mid", "vert", "lvert", "rvert"), " | "),
    "varphi": " phi ",
}
_DEGREES = re.compile(r"\^\s*\{?\s*\\(?:circ|degree)(?![a-zA-Z])")
_COMMAND = re.compile(r"\\([a-zA-Z]+)")
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\s*\{\w+\*?\}(?:\{[^{}]*\}|\[[^\[\]]*\])*")
_SYMBOLS = str.maketrans(
    {"≤": "<=", "⩽": "<=", "≥": ">=", "⩾": ">=", "≠": "!=", "×": "*", "⋅": "*", "·": "*", "∗": "*", "→": "->", "−": "-"}
    | {"–": "-", "°": " degrees ", "π": " pi ", "√": " sqrt ", "∠": " angle ", "△": " triangle ", "…": " "}
)
_SPACING = re.compile(r"\\[,;:! ]|\\\\|[~&$]|\\[()\[\]]|\{,\}")
_GROUPED = re.compile(r"(?<=\d)(?:,|\{,\}|,\\!|\\,)(?=\d{3}(?!\d))")
_TOKEN = re.compile(r"[a-z]+|\d+(?:\.\d+)?|[\u3400-\u9fff]|<=|>=|!=|->|[-+*/=<>^|!()\[\]%]")
CODE = re.compile(r"```.*?```", re.DOTALL)
_HAN = re.compile(r"[\u3400-\u9fff]")
_LETTERS = re.compile(r"[^\W\d_]")
_KANA_OR_HANGUL = re.compile(r"[\u3040-\u30ff\uac00-\ud7af]")

MATH = re.compile(
    r"\$\$(?P<display>.+?)\$\$|(?<!\\)\$(?P<inline>(?:\\.|[^$\\])+)\$|\\\((?P<paren>.+?)\\\)|\\\[(?P<bracket>.+?)\\\]"
    r"|(?P<environment>\\begin\{(?P<name>align|equation|gather|cases)\*?\}.+?\\end\{(?P=name)\*?\})",
    re.DOTALL,
)


def without_drawings(text: str) -> str:
    """The text without the source of its drawings (Asymptote, TikZ)."""
    return DRAWING.sub(" ", text)


def tokens(text: str) -> list[str]:
    r"""Words, numbers, single Chinese characters and operators, lower case, whatever the typesetting.

    Dollars, spacing, `\left`, fonts, braces, punctuation and environments are no tokens; `\dfrac` is `frac`,
    `\leqslant` is `<=`, `10{,}000` is `10000`. Drawings count for nothing.
    """
    text = unicodedata.normalize("NFKC", without_drawings(text).translate(_SYMBOLS))
    text = _SPACING.sub(" ", _GROUPED.sub("", text))
    if "\\" in text:
        text = _COMMAND.sub(_meaning, _ENVIRONMENT.sub(" ", _DEGREES.sub(r"\\circ", text)))
    return _TOKEN.findall(text.lower())


def _meaning(command: re.Match[str]) -> str:
    return _SYNONYMS.get(command[1]) or f" {command[1]} "


def shingles(words: Sequence[str], size: int) -> list[str]:
    """All runs of `size` tokens; a shorter text is one shingle."""
    if len(words) <= size:
        return [" ".join(words)] if words else []
    return [" ".join(words[i : i + size]) for i in range(len(words) - size + 1)]


_WORDS = re.findall(
    r"\w+",
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty",
)
_NAMES = {word: str(value) for value, word in enumerate(_WORDS)}
_HAN_DIGITS = {"零": 0, "一": 1, "二": 2, "两": 2, "三": 3, "四": 4, "五": 5, "六": 6, "七": 7, "八": 8, "九": 9}


def numbers(text: str) -> Counter[str]:
    r"""How often each number is written in digits; `007` is 7, `1,000` is 1000 and `2.50` is 2.5."""
    text = _GROUPED.sub("", unicodedata.normalize("NFKC", without_drawings(text)))
    found = re.findall(r"\d+(?:\.\d+)?|(?<!\d)\.\d+", _SPACING.sub(" ", text))
    return Counter(_canonical(number) for number in found)


def _canonical(number: str) -> str:
    whole, dot, fraction = number.partition(".")
    fraction = fraction.rstrip("0")
    return (whole.lstrip("0") or "0") + (dot + fraction if fraction else "")


def named_numbers(text: str) -> Counter[str]:
    """How often each of 0 to 20 is written as an English or Chinese word."""
    text = without_drawings(text)
    found = Counter(_NAMES[word] for word in re.findall(r"[a-z]+", text.lower()) if word in _NAMES)
    for match in re.findall(
        r"[一二两三四五六七八九]?十[一二三四五六七八九]?|[零一二两三四五六七八九](?![角边面])", text
    ):
        tens, ten, ones = match.partition("十")
        value = 10 * _HAN_DIGITS.get(tens, 1) + _HAN_DIGITS.get(ones, 0) if ten else _HAN_DIGITS[match]
        found[str(value)] += 1
    return found


def math_spans(text: str) -> list[str]:
    r"""The contents of `$...$`, `$$...$$`, `\(...\)`, `\[...\]` and aligned environments, without spaces."""
    spans = []
    for match in MATH.finditer(text):
        content = next(match[name] for name in ("display", "inline", "paren", "bracket", "environment") if match[name])
        spans.append(re.sub(r"\s+", "", content))
    return spans


def prose(text: str) -> str:
    """The text without formulas, drawings, code and commands."""
    return re.sub(r"\\[a-zA-Z]+", " ", CODE.sub(" ", MATH.sub(" ", without_drawings(text))))


def language(text: str) -> str:
    """`zh` where Chinese characters are most of the words outside formulas and code, `en` where Latin words are.

    A Chinese character counts as one word, as a run of Latin letters does. `other` for kana, hangul, no words, and for
    another script.
    """
    words = prose(text)
    han, latin = len(_HAN.findall(words)), len(re.findall(r"[a-zA-Z]{2,}", words))
    strange = len(_KANA_OR_HANGUL.findall(words))
    others = len(_LETTERS.findall(re.sub(r"[a-zA-Z\u3400-\u9fff]", "", words)))
    if strange > 0.05 * han or others > han + latin or han + latin == 0:
        return "other"
    return "zh" if han >= latin else "en"
