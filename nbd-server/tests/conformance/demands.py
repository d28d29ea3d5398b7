"""Compares DEMANDS.md with the protocol document: python3 demands.py doc/proto.md

Counts, section by section, the sentences with a key word of RFC 2119, and tells where the table has others. The document
itself is not kept here."""

import pathlib
import re
import sys
from collections import Counter

WORDS = re.compile(r"\b(MUST|SHOULD|SHALL|REQUIRED|RECOMMENDED)\b")
SENTENCE = re.compile(r"(?<=[.;:])\s+(?=[A-Z`*(])")
ITEM = re.compile(r"^[-*] `?(NBD_[A-Z_]+)`? ?\([\d^+ ]+\)")


def demands(text):
    """Section and text of each sentence with a key word, in order."""
    section, paragraph, found = "", [], []

    def end():
        sentences = SENTENCE.split(" ".join(line.strip() for line in paragraph))
        found.extend((section, one) for one in sentences if WORDS.search(one))
        paragraph.clear()

    for line in text.split("\n"):
        if line.startswith("#"):
            end()
            section = line.lstrip("# ").strip().replace("`", "")
        elif re.match(r"^\s*([-*]|\d+\.)\s", line):
            end()
            item = ITEM.match(line)
            if item and section != "Error values":
                section = section.split(", ")[0] + ", " + item.group(1)
            paragraph.append(line)
        elif line.strip():
            paragraph.append(line)
        else:
            end()
    end()
    return found


def main():
    document = Counter(section for section, _ in demands(pathlib.Path(sys.argv[1]).read_text()))
    table = Counter()
    for line in pathlib.Path(__file__).with_name("DEMANDS.md").read_text().split("\n"):
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) > 3 and cells[2].isdigit():
            table[cells[1]] += 1
    differ = [one for one in document | table if document[one] != table[one]]
    for section in differ:
        print(f"{section}: {document[section]} in the document, {table[section]} in the table")
    print(f"{sum(document.values())} demands in the document")
    sys.exit(bool(differ))


if __name__ == "__main__":
    main()
