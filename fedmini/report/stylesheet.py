"""How the page looks: on a screen, in the dark, in grey, and on paper."""

STYLESHEET = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1f2328; --soft: #59636e; --line: #d1d9e0; --band: #f6f8fa;
  --plot-first: #00508f; --plot-second: #d9760a; --alarm: #a40e26; --alarm-ink: #ffffff; }
@media (prefers-color-scheme: dark) { :root { --paper: #0f1318; --ink: #e6e9ed; --soft: #9aa5b1; --line: #343c45;
  --band: #181e25; --plot-first: #74b6f2; --plot-second: #f2a950; --alarm: #b5172f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, "DejaVu Sans", sans-serif; }
h1 { margin: 0; font-size: 1.9rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 2.6rem 0 .7rem; padding-top: .7rem; border-top: 1px solid var(--line); font-size: 1.25rem; }
h3 { margin: 1.6rem 0 .4rem; font-size: 1rem; }
p { margin: .5rem 0; }
.soft, figcaption, caption { color: var(--soft); font-size: .92rem; }
.headline { margin: 1rem 0; font-size: 1.2rem; line-height: 1.45; }
.alarm { margin: 1.2rem 0; padding: 1rem 1.2rem; border-radius: 6px; background: var(--alarm); color: var(--alarm-ink);
  font-weight: 700; font-size: 1.1rem; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.note { margin: 1rem 0; padding: .6rem 1rem; border-left: 4px solid var(--plot-second); background: var(--band); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { padding: .4rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
.facts th { font-weight: 600; }
.facts tr > :first-child { width: 13rem; }
.facts thead th { border-bottom: 2px solid var(--line); }
.facts td { overflow-wrap: anywhere; }
.numbers { font-variant-numeric: tabular-nums; }
.numbers th, .numbers td { text-align: right; padding: .35rem .55rem; white-space: nowrap; }
.numbers thead th { vertical-align: bottom; white-space: normal; line-height: 1.25;
  border-bottom: 2px solid var(--line); }
.numbers tbody tr:nth-child(even) { background: var(--band); }
ul { margin: .4rem 0; padding-left: 1.3rem; }
figure { margin: 1.6rem 0; break-inside: avoid; }
figure svg { display: block; width: 100%; height: auto; }
figcaption { margin-top: .3rem; }
details { margin: .8rem 0; }
summary { cursor: pointer; font-weight: 600; }
pre { margin: .6rem 0; padding: .9rem 1rem; overflow-x: auto; background: var(--band); border: 1px solid var(--line);
  border-radius: 6px; font: .85rem/1.5 ui-monospace, "DejaVu Sans Mono", Consolas, monospace; }
code { font: .88em ui-monospace, "DejaVu Sans Mono", Consolas, monospace; overflow-wrap: anywhere; }
@media print { :root { --paper: #ffffff; --ink: #000000; --soft: #333333; --line: #bbbbbb; --band: #f4f4f4;
  --plot-first: #00508f; --plot-second: #d9760a; --alarm: #a40e26; }
  body { max-width: none; padding: 0; font-size: 10.5pt; } h2, h3 { break-after: avoid; } tr { break-inside: avoid; }
  .scroll { overflow: visible; } pre { white-space: pre-wrap; } .numbers { font-size: 8pt; }
  .numbers th, .numbers td { padding: .2rem .3rem; } }
"""
