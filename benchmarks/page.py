"""The page of `volo export --format html` in a real browser: its size, the time to its first answer, and screenshots.

    make browser
    python benchmarks/page.py --out benchmarks/results/page.json --screenshots docs

The time runs from opening the page from the disk to the answer to an image that was dropped as soon as the page could be
seen, in a browser that has just been started, each time a new one. The image is drawn by `tests/drawings.py`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path.insert(0, str(TESTS))

ANSWERED = "document.body.dataset.answer"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="volo_nano", help="as `volo export` takes it")
    parser.add_argument("--licence", default="Apache-2.0", help="of its weights")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--screenshots", type=Path, help="folder for page_desktop.png and page_phone.png")
    options = parser.parse_args()

    import torch
    from browser import WEB, Browser
    from drawings import goldfish

    from volo.bench.timing import setting as machine
    from volo.data.files import write_atomically
    from volo.deploy.export import export

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        page, picture = folder / "page.html", folder / "goldfish.png"
        goldfish().save(picture)
        export(options.model, page, format="html", web_runtime=WEB, licence=options.licence)
        times, answer, version = [], "", ""
        for turn in range(options.rounds):
            with Browser(folder / f"profile{turn}") as browser:
                browser.offline()
                version = browser.send("Browser.getVersion")["product"]
                begun = time.perf_counter()
                browser.open(page)
                browser.drop([picture])
                answer = browser.wait_for(ANSWERED)
                times.append(time.perf_counter() - begun)
        print(
            f"{page.stat().st_size / 1e6:.1f} MB; first answer ({answer}) after {statistics.median(times):.2f} s {times}"
        )
        if options.screenshots is not None:
            options.screenshots.mkdir(parents=True, exist_ok=True)
            with Browser(folder / "profile") as browser:
                for name, width, height, is_dark in (("desktop", 1280, 800, False), ("phone", 390, 844, True)):
                    browser.open(page, width, height, dark=is_dark)
                    browser.drop([picture])
                    browser.wait_for(ANSWERED)
                    browser.click("#tokens")
                    browser.evaluate("scrollTo(0, 0); document.activeElement.blur()")
                    browser.screenshot(options.screenshots / f"page_{name}.png")
        if options.out is not None:
            report = {
                "what": "seconds from opening the page to its first answer, in a browser just started",
                "command": " ".join(["python benchmarks/page.py", *sys.argv[1:]]),
                "model": options.model,
                "megabytes": page.stat().st_size / 1e6,
                "first_answer_seconds": statistics.median(times),
                "all": [round(seconds, 3) for seconds in times],
                "answer": answer,
                "browser": version,
                "setting": machine(torch.device("cpu")),
            }
            content = (json.dumps(report, indent=1) + "\n").encode()
            write_atomically(options.out, lambda file: file.write(content))


if __name__ == "__main__":
    main()
