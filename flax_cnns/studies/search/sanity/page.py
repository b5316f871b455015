"""The page of the sanity checks: sanity.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flax_cnns.studies.search.sanity.findings import (
    FINE,
    LEFT_OUT,
    LOOK,
    WRONG,
    Numbers,
    SanityFinding,
)

TITLES = {
    "inputs": "Images and labels",
    "loss": "The loss before training",
    "layers": "Layers before training",
    "overfit": "A few images by heart",
    "rate": "The learning rate",
    "capacity": "Capacity",
}
PICTURES = {
    "inputs": "sanity_images.png",
    "layers": "sanity_layers.png",
    "rate": "sanity_rate.png",
    "capacity": "sanity_trainings.png",
}
NOTES = {
    "loss": "BatchNorm uses the statistics of the batch, and nothing is random.",
    "overfit": (
        "The config's optimizer at a constant rate, without augmentation, mixing, dropout and"
        " regularizers. Accuracies are those of the training step."
    ),
    "rate": (
        "The rate grows by the same factor in each step (Smith 2017,"
        " https://arxiv.org/abs/1506.01186). The steps are the config's own."
    ),
    "capacity": (
        "The rate rises over a tenth of the steps to the config's, or to a third of the range"
        " test's lowest point if that is lower, and then falls to 0 as a cosine."
        " Accuracies are of images without augmentation, with BatchNorm by the statistics of the"
        " batch. The test split is not read."
    ),
}
_MARKS = {WRONG: "**wrong**", LOOK: "*look*", FINE: "fine", LEFT_OUT: "left out"}


def summarize_findings(findings: Sequence[SanityFinding]) -> str:
    """Returns one sentence: how many things are wrong, how many to look at."""
    wrong, look = (sum(f.level == level for f in findings) for level in (WRONG, LOOK))
    verb = "is" if wrong == 1 else "are"
    text = f"{wrong} {verb} wrong" if wrong else "Nothing is wrong"
    return f"{text}, {look} to look at, {sum(f.level == FINE for f in findings)} fine."


def format_page(
    title: str,
    findings: Sequence[SanityFinding],
    parts: Mapping[str, Numbers],
    pictures: Sequence[str],
) -> str:
    """Returns the page in Markdown. `pictures`: names of the files that were drawn."""
    lines = [f"# Sanity of {title}", "", summarize_findings(findings), ""]
    for level, heading in ((WRONG, "What is wrong"), (LOOK, "What to look at")):
        chosen = [f for f in findings if f.level == level]
        if chosen:
            lines += [f"## {heading}", ""]
            lines += [f"- {_format(f)} ({TITLES[f.check].lower()})" for f in chosen] + [""]
    for check, heading in TITLES.items():
        if check not in parts:
            continue
        lines += [f"## {heading}", ""]
        if check in NOTES:
            lines += [NOTES[check], ""]
        lines += [f"- {_MARKS[f.level]}: {_format(f)}" for f in findings if f.check == check]
        lines.append("")
        if (name := PICTURES.get(check, "")) in pictures:
            lines += [f"![{heading}]({name})", ""]
    return "\n".join(lines).rstrip() + "\n"


def format_terminal(findings: Sequence[SanityFinding]) -> str:
    """Returns the findings as lines for a terminal, by check."""
    lines = []
    for check, heading in TITLES.items():
        chosen = [f for f in findings if f.check == check]
        if chosen:
            lines.append(heading)
            lines += [f"  {f.level:<8}  {_format(f)}" for f in chosen]
    return "\n".join([*lines, summarize_findings(findings)])


def _format(finding: SanityFinding) -> str:
    text = finding.text[:1].upper() + finding.text[1:]
    remedy = f" Try: {finding.remedy}." if finding.remedy else ""
    return f"{text}.{remedy}"
