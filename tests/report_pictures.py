"""The pictures of the report in README and docs, of a run that `dual-rollout train` has left.

    python -m tests.report_pictures outputs/grpo_cpu

Light: the figures, and of the rewarded rollouts the one with the token that π_t likes better than π_θ by most. Dark:
without the figures, coloured by weight, the one with the largest.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from dual_rollout.report.page import write_report
from tests.browser import browser

FOLDER = Path(__file__).parents[1] / "docs/images"
SIZE = {"width": 1180, "height": 840}

FIND = """() => {
  const rewarded = rollouts.filter(rollout => rollout.reward > 0), best = { value: -Infinity };
  for (const rollout of rewarded.length ? rewarded : rollouts) {
    for (let i = rollout.start; i < rollout.end; i++) {
      const value = /\\w/.test(text(i)) ? colour.value(i) : NaN;
      if (value > best.value) Object.assign(best, { value, rollout: rollout.number, i });
    }
  }
  return best;
}"""
SHOW = """([number, i]) => {
  select(rollouts[number]);
  document.querySelector(`#rollout span[data-i="${i}"]`).focus();
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's folder, as the page's title names it")
    parser.add_argument("--output", type=Path, default=FOLDER)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, browser() as chromium:
        report = Path(folder) / "report.html"
        write_report([args.run], report)
        for theme, key in (("light", "4"), ("dark", "2")):
            page = chromium.new_page(viewport=SIZE, color_scheme=theme)
            page.goto(report.as_uri())
            page.keyboard.press(key)
            if theme == "dark":
                page.click("#figures summary")
            found = page.evaluate(FIND)
            page.evaluate(SHOW, [found["rollout"], found["i"]])
            page.mouse.move(0, 0)
            page.screenshot(path=args.output / f"report-{theme}.png")


if __name__ == "__main__":
    main()
