"""Draws the pictures of README.md as SVG files, beside this script.

    python train.py
    python sample.py --compare --steps 2,4,8,16,32,inf --k 2,4,16 --num 2000 --json out/compare.json
    python assets/figures.py        from the root of the repository, in a minute or two

It reads the toy checkpoints in out/toy and the figures in out/compare.json. All seeds are fixed.
Each picture has its own colours for light and for dark pages. It also has its own background, so
that it stays legible where the browser and the page disagree about which of the two it is.
"""

import html
import itertools
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import data
import edlm
import sample

RUN, COMPARE = Path("out/toy"), Path("out/compare.json")

# ------------ Drawing -----------------------------------------------------------------------------

WIDTH = 800  # pixels: about what GitHub shows
COLOURS = {  # name: (on a light page, on a dark one)
    "page": ("#ffffff", "#0d1117"),
    "ink": ("#1f2328", "#e6edf3"),
    "soft": ("#59636e", "#9ba4ae"),
    "grid": ("#d1d9e0", "#30363d"),
    "blue": ("#0069b4", "#58a6ff"),
    "orange": ("#b35900", "#f0a132"),
    "green": ("#00785a", "#3fb68b"),
    "purple": ("#8250df", "#bc8cff"),
    "red": ("#cf222e", "#ff7b72"),
}
STYLE = """
text { font: 13px -apple-system, "Segoe UI", "Noto Sans", Helvetica, Arial, sans-serif }
.mono { font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace }
.small { font-size: 12px } .bold { font-weight: 600 } .tint { fill-opacity: 0.25 }
.area { fill-opacity: 0.12 }
.line { fill: none; stroke-width: 2 } .thin { stroke-width: 1 } .dashed { stroke-dasharray: 5 4 }
"""


def stylesheet(page: int) -> str:
    """The classes of a light (0) or dark (1) page: <colour> fills, <colour>-line strokes."""
    rules = [
        f".{name} {{ fill: {pair[page]} }} .{name}-line {{ stroke: {pair[page]} }}"
        for name, pair in COLOURS.items()
    ]
    return "\n".join(rules)


def text(x: float, y: float, words: str, style: str = "ink", anchor: str = "start") -> str:
    """Words whose baseline starts, has its middle or ends (anchor) at x, y; line below line."""
    elements = [
        f'<text x="{x:.1f}" y="{y + 17 * i:.1f}" text-anchor="{anchor}" class="{style}">'
        f"{html.escape(part)}</text>"
        for i, part in enumerate(words.split("\n"))
    ]
    return "\n".join(elements)


def heading(x: float, y: float, title: str, remark: str) -> str:
    """A title, and a line below it that explains it."""
    return text(x, y, title, "ink bold") + text(x, y + 20, remark, "soft small")


def line(*points: tuple[float, float], style: str) -> str:
    """A line through all points."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" class="line {style}"/>'


def box(x: float, y: float, width: float, height: float, style: str, more: str = "") -> str:
    """A rectangle with slightly round corners; more: further attributes."""
    size = f'width="{width:.1f}" height="{height:.1f}" rx="2"'
    return f'<rect x="{x:.1f}" y="{y:.1f}" {size} class="{style}" {more}/>'


def mark(x: float, y: float, shape: str, style: str) -> str:
    """A data point: a circle, square or diamond around x, y."""
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" class="{style}"/>'
    turn = 45 if shape == "diamond" else 0
    return box(x - 4, y - 4, 8, 8, style, f'transform="rotate({turn} {x:.1f} {y:.1f})"')


def save(name: str, height: int, title: str, parts: list[str], style: str = "") -> None:
    """Writes <name>.svg: the parts on a background, and a title for screen readers."""
    size = f'width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
    whole = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">',
        f"<title>{html.escape(title)}</title>",
        f"<style>\n{stylesheet(0)}\n@media (prefers-color-scheme: dark) {{\n{stylesheet(1)}\n}}",
        f"{STYLE}{style}</style>",
        box(0, 0, WIDTH, height, "page"),
        *parts,
        "</svg>\n",
    ]
    path = Path(__file__).with_name(f"{name}.svg")
    path.write_text("\n".join(whole), encoding="utf-8")
    print(path)


@dataclass
class Axes:
    """A panel: where it lies on the page, and which values its edges stand for."""

    left: float
    right: float
    first: float  # the value at the left edge
    last: float
    high: float  # the value at the top; 0 is at the bottom
    log: bool = False  # x grows by factors
    top: float = 60
    bottom: float = 320

    def at(self, x: float, y: float) -> tuple[float, float]:
        """The place of a pair of values on the page."""
        first, x, last = (math.log(v) if self.log else v for v in (self.first, x, self.last))
        across = self.left + (x - first) / (last - first) * (self.right - self.left)
        return across, self.bottom - y / self.high * (self.bottom - self.top)

    def frame(self, title: str, x_label: str, x_ticks: list, y_ticks: list) -> list[str]:
        """Title, grid lines, ticks and the name of the x axis."""
        middle = (self.left + self.right) / 2
        parts = [text(self.left, 28, title, "ink bold")]
        parts.append(text(middle, self.bottom + 40, x_label, "soft", "middle"))
        for y in y_ticks:
            level = self.at(self.first, y)[1]
            parts.append(line((self.left, level), (self.right, level), style="grid-line thin"))
            parts.append(text(self.left - 8, level + 4, f"{y:g}", "soft small", "end"))
        for x in x_ticks:
            parts.append(text(self.at(x, 0)[0], self.bottom + 18, f"{x:g}", "soft small", "middle"))
        return parts

    def point(self, x: float, y: float, error: float, shape: str, colour: str) -> str:
        """A mark, with two standard errors up and down."""
        ends = self.at(x, y - 2 * error), self.at(x, y + 2 * error)
        return line(*ends, style=f"{colour}-line thin") + mark(*self.at(x, y), shape, colour)


# ------------ 1. The method in one picture --------------------------------------------------------

STORY = "sue has a red boat. she gives it to eva today. she likes the red boat."
GAPS, DUE = [5, 8, 15, 17, 18], [5, 15, 17]  # positions of masked words, and of those revealed next
STAGES = {"draft": 24, "judge": 36, "keep": 48, "reveal": 60}  # when they come back, in percent
LETTER = 7.8  # width of a letter of 13 pixels


def toy_block(tokenizer, story: str) -> torch.Tensor:
    """A story as the models read it: Long[1, L], BOS first and the end of the text last."""
    end = tokenizer.eot_token
    return torch.tensor([[end, *data.encode(tokenizer, story), end]])


def draw_step(models, tokenizer):
    """One step of decoding with four drafts: (x_t [L], candidates [4, L], energy [4], kept).

    The seed is the first of 0, 1, 2, ... that gives four different drafts, one of them right, and
    keeps that one though it need not. More often than not all four are broken. A rare draft with a
    word that no story has at its place is not shown.
    """
    denoiser, x_t = models["denoiser"], toy_block(tokenizer, STORY)
    x_t[:, GAPS] = denoiser.config.mask_id
    where = x_t == denoiser.config.mask_id
    language = torch.cat([toy_block(tokenizer, story) for story in data.toy_language()])
    for seed in itertools.count():
        generator = torch.Generator().manual_seed(seed)
        candidates, log_q = edlm.propose(denoiser(x_t, where), x_t, where, 4, generator)
        energy = models["energy"](candidates, x_t, log_q)
        weights = edlm.importance_weights(energy)[0]
        kept = weights.multinomial(1, generator=generator).item()
        texts = [data.decode(tokenizer, row) for row in candidates[0].tolist()]
        valid = [data.toy_is_valid(draft) for draft in texts]
        clear = len(set(texts)) == 4 and sum(valid) == 1 and valid[kept]
        words = all(torch.isin(candidates[0, :, i], language[:, i]).all() for i in GAPS)
        if clear and words and weights[kept] < 0.95:
            return x_t[0], candidates[0], energy[0], kept


def broken_words(tokenizer, row: torch.Tensor) -> list[int]:
    """The fewest words in the gaps of row Long[L] that must change, the later if in doubt."""
    language = torch.cat([toy_block(tokenizer, story) for story in data.toy_language()])
    ways = [(story != row).nonzero()[:, 0].tolist() for story in language]
    possible = [way for way in ways if set(way) <= set(GAPS)]
    return min(possible, key=lambda way: (len(way), -sum(way)))


def story_line(tokenizer, row: torch.Tensor, y: float, styles: dict[int, str]) -> list[str]:
    """A toy story, word by word; styles: {position: class}, "gap" for a masked word."""
    parts, x = [], 42 - LETTER
    for position, original in enumerate(toy_block(tokenizer, STORY)[0, 1:-1].tolist(), 1):
        style = styles.get(position, "soft")
        word = tokenizer.decode([original if style == "gap" else row[position].item()])
        x += LETTER * word.startswith(" ")
        width = LETTER * len(word.strip())
        if style == "gap":
            parts.append(box(x, y - 12, width, 16, "grid"))
        else:
            parts.append(text(x, y, word.strip(), f"{style} mono"))
        if "red" in style:
            parts.append(line((x - 1, y - 4), (x + width + 1, y - 4), style="red-line thin"))
        x += width
    return parts


def draft_row(tokenizer, y: float, row, energy: float, weight: float, kept: bool, nat) -> dict:
    """What each stage of the animation shows of a draft; nat: how many pixels are 1 nat."""
    styles = dict.fromkeys(GAPS, "ink bold")
    styles |= dict.fromkeys(broken_words(tokenizer, row), "red bold")
    colour, bold = ("blue", " bold") if kept else ("soft", "")
    zero = 640  # where energy 0 lies
    number = f"{energy:.1f}".replace("-", "\u2212")
    frame = [box(10, y - 19, 780, 28, "blue-line line")] if kept else []
    return {
        "draft": story_line(tokenizer, row, y, styles),
        "judge": [
            box(zero + nat * min(0, energy), y - 14, nat * abs(energy), 18, f"{colour} tint"),
            line((zero, y - 18), (zero, y + 8), style="soft-line thin"),
            text(698, y, number, "ink small" + bold, "end"),
        ],
        "keep": [
            box(716, y - 14, max(1, 64 * weight), 18, f"{colour} tint"),
            text(776, y, f"{weight:.2f}", "ink small" + bold, "end"),
            *frame,
        ],
    }


def motion() -> str:
    """The animation: all is there, all but the story fades, and the stages come back in turn."""
    rules = [
        f".{stage} {{ animation: {stage} 15s linear 4 }} @keyframes {stage} {{ "
        f"20% {{ opacity: 1 }} 22%, {back}% {{ opacity: 0 }} {back + 4}% {{ opacity: 1 }} }}"
        for stage, back in STAGES.items()
    ]
    return "@media (prefers-reduced-motion: no-preference) {\n" + "\n".join(rules) + "\n}\n"


def draw_hero(models, tokenizer) -> None:
    """One step of decoding: draft, judge, keep one, reveal. Whole in its first frame."""
    x_t, candidates, energy, kept = draw_step(models, tokenizer)
    weights = edlm.importance_weights(energy[None])[0]
    rule = "what sue has is named again; gives goes with likes, shows with wants, sells with keeps"
    blind = "all gaps are filled at once, each blind to the others; words that clash are struck out"
    again = "some words of the kept draft; then draft again, knowing them"
    gaps = dict.fromkeys(GAPS, "gap")
    after = gaps | dict.fromkeys(DUE, "blue bold")
    nat = min(60 / energy.max().item(), 26 / max(0.1, -energy.min().item()))
    stages = {
        "draft": [heading(20, 114, "1 Draft", blind)],
        "judge": [heading(612, 114, "2 Judge", "E, low is good")],
        "keep": [heading(716, 114, "3 Keep", "softmax(\u2212E)")],
        "reveal": [heading(20, 290, "4 Reveal", again)],
    }
    stages["reveal"] += story_line(tokenizer, candidates[kept], 336, after)
    for i in range(4):
        judged = energy[i].item(), weights[i].item(), i == kept, nat
        for stage, more in draft_row(tokenizer, 164 + 28 * i, candidates[i], *judged).items():
            stages[stage] += more
    parts = [heading(20, 28, "A story with five gaps", rule)]
    parts += story_line(tokenizer, x_t, 74, gaps)
    for stage in STAGES:
        parts += [f'<g class="{stage}">', *stages[stage], "</g>"]
    title = "Four drafts of a story: three are broken, the energy picks the one that agrees"
    save("hero", 356, title, parts, motion())


# ------------ 2. Do the two colours agree? --------------------------------------------------------

FIRST, SECOND = 4, 17  # where a story says its colour
K = 16  # candidates, here and in picture 4


def colour_tables(models, tokenizer) -> list[torch.Tensor]:
    """P(first colour, second colour) in one step from all masks: language, mu, after judging."""
    colours = torch.tensor([data.encode(tokenizer, f" {word}")[0] for word in data.TOY_COLOURS])
    x_t, mask_id = toy_block(tokenizer, STORY).repeat(200, 1), models["denoiser"].config.mask_id
    x_t[:, 1:] = mask_id
    where = x_t == mask_id
    logits = models["denoiser"](x_t, where)
    mu = edlm.put_back(logits.softmax(dim=1), where)[0][:, colours]  # [L, 4]
    generator, judged, rounds = torch.Generator().manual_seed(0), torch.zeros(4, 4), 20
    for _ in range(rounds):  # 20 x 200 drafts are kept
        candidates, log_q = edlm.propose(logits, x_t, where, K, generator)
        weights = edlm.importance_weights(models["energy"](candidates, x_t, log_q))  # [B, K]
        first = (candidates[:, :, FIRST, None] == colours).float()  # [B, K, 4]
        second = (candidates[:, :, SECOND, None] == colours).float()
        judged += torch.einsum("bk,bki,bkj->ij", weights, first, second) / len(x_t) / rounds
    return [torch.eye(4) / 4, torch.outer(mu[FIRST], mu[SECOND]), judged]


def heat_map(table: torch.Tensor, left: float, title: str, remark: str) -> list[str]:
    """A 4 x 4 table of probabilities; the stronger the colour, the more probable."""
    top, cell = 84, 46
    parts = [heading(left, 28, title, remark)]
    for i, colour in enumerate(data.TOY_COLOURS):
        middle = cell * (i + 0.5)
        parts.append(text(left + middle, top - 8, colour, "soft small", "middle"))
        parts.append(text(left - 8, top + middle + 4, colour, "soft small", "end"))
    for i, j in itertools.product(range(4), range(4)):
        x, y, p = left + cell * j, top + cell * i, table[i, j].item()
        parts.append(box(x + 1, y + 1, cell - 2, cell - 2, "blue", f'fill-opacity="{2.2 * p:.3f}"'))
        parts.append(text(x + cell / 2, y + cell / 2 + 4, f"{p:.2f}", "ink small", "middle"))
    parts.append(box(left, top, 4 * cell, 4 * cell, "grid-line line thin"))
    agree = f"the colours agree: {100 * table.trace():.0f}%"
    return [*parts, text(left + 2 * cell, top + 4 * cell + 26, agree, "ink", "middle")]


def draw_agreement(models, tokenizer) -> None:
    """Three heat maps: the language, the denoiser alone, and after judging."""
    titles = (
        ("The language", "a story has one colour"),
        ("Denoiser alone, one step", "each word on its own"),
        (f"EDLM-NCE, k = {K}, one step", "after judging whole drafts"),
    )
    tables, parts = colour_tables(models, tokenizer), []
    for i, (table, words) in enumerate(zip(tables, titles, strict=True)):
        parts += heat_map(table, 80 + 250 * i, *words)
    remark = "rows: first colour in the story; columns: second colour; numbers: probability"
    parts.append(text(WIDTH / 2, 328, remark, "soft", "middle"))
    title = "How often the first and the second colour of a story agree, as three heat maps"
    save("agreement", 346, title, parts)


# ------------ 3. The price ------------------------------------------------------------------------

SERIES = (  # (model, k, colour, shape, style of the line, words)
    ("MDLM", None, "soft", "circle", "", "MDLM"),
    ("EDLM-AR", 4, "blue", "circle", "dashed", "EDLM-AR, k = 4"),
    ("EDLM-AR", 16, "blue", "circle", "", "EDLM-AR, k = 16"),
    ("EDLM-NCE", 4, "orange", "square", "dashed", "EDLM-NCE, k = 4"),
    ("EDLM-NCE", 16, "orange", "square", "", "EDLM-NCE, k = 16"),
)


def price_panel(axes: Axes, rows: list[dict], cost: str, scale: float) -> list[str]:
    """Valid fraction against the field `cost` of the rows, times scale."""

    def point(row: dict) -> tuple[float, float]:
        return row[cost] * scale, row["valid_fraction"]

    parts = []
    for model, k, colour, shape, style, _ in SERIES:
        curve = [row for row in rows if (row["model"], row["k"]) == (model, k)]
        curve.sort(key=lambda row: row["steps"] or math.inf)
        places = [axes.at(*point(row)) for row in curve]
        parts.append(line(*places, style=f"{colour}-line {style}"))
        for row in curve:
            parts.append(axes.point(*point(row), row["valid_fraction_error"], shape, colour))
    named = {row["name"]: row for row in rows}
    for name, words, colour, side in (
        ("EDLM-coAR exact", "exact coAR", "green", "end"),
        ("AR", "AR", "purple", "start"),
    ):
        error = named[name]["valid_fraction_error"]
        parts.append(axes.point(*point(named[name]), error, "diamond", colour))
        x, y = axes.at(*point(named[name]))
        parts.append(text(x, y - 12, words, f"{colour} small", side))
    x, y = axes.at(*point(named["MDLM T=inf"]))
    parts.append(line((x + 2, y + 6), (x + 20, axes.bottom - 50), style="soft-line thin"))
    words = "MDLM, one\nword at a time"
    parts.append(text(x + 20, axes.bottom - 36, words, "soft small", "middle"))
    x, y = axes.at(*point(named["MDLM T=2"]))
    return [*parts, text(x + 8, y + 14, "T = 2", "soft small")]


def draw_price(rows: list[dict]) -> None:
    """Valid stories against passes one after the other, and against time."""
    rows = [row for row in rows if row["valid_fraction"] is not None]
    parts = []
    for left, cost, scale, title, x_label in (
        (
            50,
            "passes_in_turn",
            1,
            "Valid stories against passes",
            "network passes, one after the other",
        ),
        (450, "seconds_alone", 1e3, "Valid stories against time", "milliseconds, one text alone"),
    ):
        costs = [scale * row[cost] for row in rows]
        axes = Axes(left, left + 335, min(costs) / 1.3, max(costs) * 1.5, 1.1, log=True)
        ticks = [m * 10.0**e for e in range(-3, 6) for m in (1, 2, 5)]
        ticks = [tick for tick in ticks if axes.first < tick < axes.last]
        parts += axes.frame(title, x_label, ticks, [0, 0.2, 0.4, 0.6, 0.8, 1])
        parts += price_panel(axes, rows, cost, scale)
    for i, (_, _, colour, shape, style, words) in enumerate(SERIES):
        x, y = 50 + 150 * i - 60 * (i > 0), 392
        parts.append(line((x, y - 4), (x + 30, y - 4), style=f"{colour}-line {style}"))
        parts += [mark(x + 15, y - 4, shape, colour), text(x + 36, y, words, f"{colour} small")]
    title = "Fraction of valid stories against passes one after the other, and against time"
    save("price", 410, title, parts)


# ------------ 4. Effective sample size ------------------------------------------------------------


def sizes_by_step(models, tokenizer, energy, steps: int) -> list[tuple[float, float]]:
    """(mean, standard error) of the effective sample size of K in each step, over 1,000 stories."""
    sizes, mask_id = [[] for _ in range(steps)], models["denoiser"].config.mask_id
    x = toy_block(tokenizer, STORY).repeat(1000, 1)
    x[:, 1:] = mask_id
    chain = dict(mask_id=mask_id, steps=steps, energy=energy, k=K)
    chain["generator"] = torch.Generator().manual_seed(0)
    for state in edlm.sample_states(models["denoiser"], x, **chain):
        for t, size in zip(state.t.tolist(), state.ess.tolist(), strict=True):
            if not math.isnan(size):  # it is where nothing was judged
                sizes[round(steps * (1 - t)) - 1].append(size)
    tables = [torch.tensor(step) for step in sizes]
    return [(table.mean().item(), table.std().item() / len(table) ** 0.5) for table in tables]


def draw_sizes(models, tokenizer) -> None:
    """How many of the 16 candidates count, step by step; the paper judges in the shaded steps."""
    steps, window = 8, 0.2
    judged = math.ceil(window * steps)  # steps that begin while t > 1 - window
    axes = Axes(60, 690, 0.5, steps + 0.5, K)
    (left, top), (right, bottom) = axes.at(0.5, K), axes.at(judged + 0.5, 0)
    middle = (left + right) / 2
    parts = [
        box(left, top, right - left, bottom - top, "soft area"),
        text(middle, top + 22, f"the paper's window\nw = {window}", "ink small", "middle"),
    ]
    title = f"How many of {K} candidates count: effective sample size in each of {steps} steps"
    parts += axes.frame(title, "step", list(range(1, steps + 1)), [0, 4, 8, 12, 16])
    ends = []
    for name, colour, shape in (("ar", "blue", "circle"), ("nce", "orange", "square")):
        sizes = sizes_by_step(models, tokenizer, sample.make_energy(name, models), steps)
        places = [axes.at(step, size) for step, (size, _) in enumerate(sizes, 1)]
        parts.append(line(*places, style=f"{colour}-line"))
        for step, (size, error) in enumerate(sizes, 1):
            parts.append(axes.point(step, size, error, shape, colour))
        ends.append((places[-1][1], sample.ENERGIES[name][1], colour))
    (upper, *above), (lower, *below) = sorted(ends)
    parts.append(text(axes.right + 10, upper, *above))
    parts.append(text(axes.right + 10, max(lower, upper + 17), *below))
    save("ess", 374, "The effective sample size rises from step to step", parts)


# ------------ 5. Two bits -------------------------------------------------------------------------


def draw_two_bits() -> None:
    """The published formula for two fair bits that are always equal, against what they cost."""
    axes = Axes(60, 640, 0.9, 80, 1.1, log=True)
    (left, top), (right, bottom) = axes.at(0.9, 1), axes.at(80, 0)
    parts = [box(left, top, right - left, bottom - top, "soft area")]
    title = "Two fair bits that are always equal: what a chain of T steps charges for them, in bits"
    chains = [1, 2, 4, 8, 16, 64]
    parts += axes.frame(title, "steps T", chains, [0, 0.25, 0.5, 0.75, 1])
    published = [(T, (T + 1) / (2 * T)) for T in chains]
    parts.append(line((left, top), (right, top), style="blue-line"))
    parts.append(line(*(axes.at(*pair) for pair in published), style="orange-line"))
    for T, bits in published:
        x, y = axes.at(T, bits)
        parts += [mark(x, y, "square", "orange"), mark(*axes.at(T, 1), "circle", "blue")]
        parts.append(text(x, y + 22, f"{bits:.4g}", "ink small", "middle"))
    parts.append(text(right + 12, top, "true cost, and\nentropy: 1 bit", "blue"))
    parts.append(text(right + 12, y, "published formula\n(T + 1) / 2T bits", "orange"))
    remark = "below the entropy: no model can charge so little on average"
    parts.append(text((left + right) / 2, bottom - 40, remark, "ink", "middle"))
    save("two_bits", 374, "The published formula falls from 1 bit to half a bit", parts)


# ------------ All of them -------------------------------------------------------------------------


@torch.no_grad()
def main() -> None:
    """Draws every picture."""
    if not COMPARE.exists():
        raise FileNotFoundError(f"no {COMPARE}: run the commands at the top of assets/figures.py")
    rows = json.loads(COMPARE.read_text())["rows"]
    models, name = edlm.load_models(RUN, ["denoiser", "ar", "energy"])
    tokenizer = data.get_tokenizer(name)
    draw_hero(models, tokenizer)
    draw_agreement(models, tokenizer)
    draw_price(rows)
    draw_sizes(models, tokenizer)
    draw_two_bits()


if __name__ == "__main__":
    data.run(main)
