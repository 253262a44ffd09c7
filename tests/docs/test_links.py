from __future__ import annotations

import re
from pathlib import Path

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def anchors(text: str) -> set[str]:
    """The anchors GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_between_pages_resolve(pages: dict[str, str], repository: Path) -> None:
    broken = []
    for page, text in pages.items():
        for link in LINK.findall(text):
            if re.match(r"[a-z]+:", link):
                continue
            target, _, anchor = link.partition("#")
            file = (repository / page).parent / target if target else repository / page
            if not file.exists() or (anchor and anchor not in anchors(file.read_text(encoding="utf-8"))):
                broken.append(f"{page}: {link}")
    assert not broken


def test_every_page_can_be_reached_from_readme(pages: dict[str, str], repository: Path) -> None:
    reached, waiting = set(), ["README.md"]
    while waiting:
        page = waiting.pop()
        if page in pages and page not in reached:
            reached.add(page)
            for link in LINK.findall(pages[page]):
                if not re.match(r"[a-z]+:", link):
                    target = (repository / page).parent / link.partition("#")[0]
                    waiting.append(target.resolve().relative_to(repository.resolve()).as_posix())
    assert reached == set(pages)


def test_decisions_are_numbered_without_gaps_and_have_three_parts(pages: dict[str, str]) -> None:
    decisions = {page: text for page, text in pages.items() if re.match(r"docs/decisions/\d", page)}
    assert [int(Path(page).name[:4]) for page in sorted(decisions)] == list(range(1, len(decisions) + 1))
    for page, text in decisions.items():
        assert text.startswith(f"# {int(Path(page).name[:4])}. ")
        assert re.findall(r"^## (.+)$", text, re.MULTILINE) == ["Context", "Decision", "Consequences"], page


def test_named_source_files_exist(pages: dict[str, str], repository: Path) -> None:
    package = repository / "meliad_edge"
    missing = []
    for page, text in pages.items():
        for name in re.findall(r"`([\w/]+(?:\.(?:py|hpp|cpp|sh)|/))`", text):
            places = (repository / name, package / name, *package.glob(f"*/{name}"))
            # Folders of the tutorial are the reader's.
            if page != "docs/tutorial.md" and not any(place.exists() for place in places):
                missing.append(f"{page}: {name}")
    assert not missing
