#!/usr/bin/env bash
# PDFium, by pypdfium2 5.15: a page's UserUnit counts for nothing, and a large sheet is taken for a small one.
#
# Coordinates in a PDF are points, and may be at most 14 400 in many programs: 5.08 m. For larger sheets PDF 1.6 has
# the page's /UserUnit, the size of its unit in points. Programs for construction and maps write it.
#
# Expected: a page's size is in points, as pypdfium2 documents it, so that "dpi / 72" as scale renders at so many dots
# per inch. MuPDF's page is larger by the factor.
# What happens: PDFium's page has the size of its MediaBox, whatever the unit is. With a UserUnit of 4 an image at 150
# dpi has the pixels of 37.5 dpi, and no call tells the unit.
# Why it matters to a server of vision-language models: it renders pages at a fixed resolution, in which print is
# legible. Of a drawing with a UserUnit the model is shown a thumbnail in which no dimension can be read, and it answers
# all the same. Whoever sends such drawings has to ask for more dots per inch.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q pypdfium2==5.15.2 pymupdf==2.0
cat > "$work/unit.py" <<'PY'
import pymupdf
import pypdfium2
from importlib.metadata import version


def document(fields):
    """A PDF with one page of 100 by 50 units."""
    parts = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 100 50] {fields} >>",
    ]
    data, starts = "%PDF-1.6\n", []
    for number, part in enumerate(parts, 1):
        starts.append(len(data))
        data += f"{number} 0 obj\n{part}\nendobj\n"
    table = "".join(f"{start:010d} 00000 n \n" for start in starts)
    end = f"xref\n0 {len(parts) + 1}\n0000000000 65535 f \n{table}trailer\n<< /Size {len(parts) + 1} /Root 1 0 R >>\n"
    return (data + end + f"startxref\n{len(data)}\n%%EOF\n").encode()


print("pypdfium2", version("pypdfium2"), "PyMuPDF", version("pymupdf"))
for unit in (1, 4, 0.5):
    data = document(f"/UserUnit {unit}")
    page = pypdfium2.PdfDocument(data)[0]
    image = page.render(scale=150 / 72)
    theirs = pymupdf.open(stream=data)[0].rect
    print(f"UserUnit {unit}: PDFium {page.get_size()}, at 150 dpi {image.width} x {image.height}; ", end="")
    print(f"MuPDF {theirs.width} x {theirs.height}")
    assert page.get_size() == (100, 50) and (image.width, image.height) == (209, 105)
    assert (theirs.width, theirs.height) == (100 * unit, 50 * unit)
PY
"$work/venv/bin/python" "$work/unit.py"
