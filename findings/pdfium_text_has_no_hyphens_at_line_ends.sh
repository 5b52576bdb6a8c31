#!/usr/bin/env bash
# PDFium, by pypdfium2 5.15: a hyphen at the end of a line is missing in a page's text, and so is the line's end.
#
# "well-" at the end of one line and "known" at the beginning of the next is "well-known" or, for other words, a
# word that was cut. A page doesn't say which; pdfminer gives the hyphen and the line's end, as they stand there.
#
# Expected: the text of a page has its hyphens, as it has them within lines and before a digit.
# What happens: hyphen and line end together become one control character, U+0002 in a text by bounds and the
# noncharacter U+FFFE in one by range, though the page has a plain hyphen: "well\x02known". JSON, prompts and
# tokenizers take it without an error. FPDFText_IsHyphen knows the character, but pypdfium2's texts don't use it.
# Why it matters to a server of vision-language models: the text layer of a page is put beside its image, or into an
# index. A justified page has such a line in every paragraph; "A\x02B" and "INV\x02b17" are no words that a model or
# a search knows. Whoever passes texts on has to put "-\n" there.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q pypdfium2==5.15.2 pdfminer.six==20260107
cat > "$work/hyphen.py" <<'PY'
import io
from importlib.metadata import version

import pypdfium2
from pdfminer.high_level import extract_text


def document(lines):
    """A PDF with one page of lines of text."""
    shown = " ".join(f"({line}) Tj T*" for line in lines)
    content = f"BT /F 12 Tf 14 TL 20 80 Td {shown} ET"
    parts = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 200 100] /Contents 4 0 R /Resources << /Font << /F 5 0 R >> >> >>",
        f"<< /Length {len(content)} >>\nstream\n{content}\nendstream",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    data, starts = "%PDF-1.7\n", []
    for number, part in enumerate(parts, 1):
        starts.append(len(data))
        data += f"{number} 0 obj\n{part}\nendobj\n"
    table = "".join(f"{start:010d} 00000 n \n" for start in starts)
    end = f"xref\n0 {len(parts) + 1}\n0000000000 65535 f \n{table}trailer\n<< /Size {len(parts) + 1} /Root 1 0 R >>\n"
    return (data + end + f"startxref\n{len(data)}\n%%EOF\n").encode()


print("pypdfium2", version("pypdfium2"), "pdfminer.six", version("pdfminer.six"))
data = document(["a well-", "known rule of 2019-", "2020"])
page = pypdfium2.PdfDocument(data)[0].get_textpage()
bounded, ranged = page.get_text_bounded(), page.get_text_range()
theirs = extract_text(io.BytesIO(data))
print("PDFium by bounds", ascii(bounded), "by range", ascii(ranged), "pdfminer", ascii(theirs))
assert bounded == "a well\x02known rule of 2019-\r\n2020"
assert ranged == "a well\ufffeknown rule of 2019-\r\n2020"
assert "a well-\nknown rule of 2019-\n2020" in theirs
PY
"$work/venv/bin/python" "$work/hyphen.py"
