"""Draw one epoch of a small dataset's order as docs/images/order.svg: python docs/draw_order.py"""

from pathlib import Path

import numpy as np

from pipeline.loading.order import Order

SIZES, B, LANES, BLOCK, WORKERS, EPOCH = (7, 6, 8, 5, 8), 8, 4, 3, 2, 1
COLOURS = ("#8ecae6", "#ffb703", "#b7e4c7", "#f4a6b4", "#cdb4db")
CELL, LEFT, GAP = 22, 24, 60


def main() -> None:
    order = Order(np.array(SIZES), seed=0, global_batch=B, lanes=LANES, block=BLOCK)
    shard_of = np.repeat(np.arange(len(SIZES)), SIZES)
    shards, _ = order.row(EPOCH)
    permuted = np.concatenate([order.first_ids[s] + np.arange(SIZES[s]) for s in shards])
    row = np.roll(permuted, -order.rotation(EPOCH))
    trained = order.steps_per_epoch * B
    parts: list[str] = []

    def text(x: float, y: float, words: str, style: str = "") -> None:
        parts.append(f'<text x="{x}" y="{y}" {style}>{words}</text>')

    def cell(x: float, y: float, sample: int, faded: bool = False) -> None:
        fill = COLOURS[shard_of[sample]]
        opacity = ' opacity="0.35"' if faded else ""
        parts.append(
            f'<rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" fill="{fill}" stroke="#fff"{opacity}/>'
        )
        text(x + CELL / 2, y + 15, str(sample), 'text-anchor="middle" class="id"')

    y = 20
    text(LEFT, y, f"1. Shards in a permuted order, samples end to end (N = {order.samples} samples)")
    for i, sample in enumerate(permuted):
        cell(LEFT + i * CELL, y + 10, sample)
    at = 0
    for s in shards:
        text(LEFT + (at + SIZES[s] / 2) * CELL, y + 48, f"shard {s}", 'text-anchor="middle" class="note"')
        at += SIZES[s]

    y += GAP + 34
    text(
        LEFT,
        y,
        f"2. Rotated; cut into V = {LANES} lanes; the rest of N mod B = {order.samples - trained} is dropped (B = {B})",
    )
    for i, sample in enumerate(row):
        cell(LEFT + i * CELL + (8 * min(i // order.lane_length, LANES)), y + 10, sample, faded=i >= trained)
    for lane in range(LANES):
        x = LEFT + (lane + 0.5) * order.lane_length * CELL + 8 * lane
        text(x, y + 48, f"lane {lane}", 'text-anchor="middle" class="note"')
    text(LEFT + (trained + 1) * CELL + 8 * LANES, y + 48, "dropped", 'text-anchor="middle" class="note"')

    y += GAP + 34
    text(
        LEFT,
        y,
        f"3. Blocks of K = {BLOCK} samples (framed) are permuted; step t takes B/V = {order.per_lane} samples of every lane",
    )
    left = LEFT + 70
    for step in range(order.steps_per_epoch):
        x = left + (step + 0.5) * (order.per_lane * CELL + 14) - 7
        text(x, y + 22, f"step {step}", 'text-anchor="middle" class="note"')
    for lane in range(LANES):
        top = y + 30 + lane * (CELL + 10)
        text(LEFT, top + 15, f"lane {lane}", 'class="note"')
        positions = np.arange(order.lane_length)
        ids = order.sample_ids(EPOCH, np.array([lane]), positions)[0]
        xs = [left + p * CELL + 14 * (p // order.per_lane) for p in positions]
        for p, sample in enumerate(ids):
            cell(xs[p], top, int(sample))
        begin = 0
        while begin < order.lane_length:
            end = int(order.block_ends(np.array([lane]), np.array([begin]))[0])
            width = xs[end - 1] + CELL - xs[begin]
            parts.append(
                f'<rect x="{xs[begin]}" y="{top - 2}" width="{width}" height="{CELL + 4}" class="block"/>'
            )
            begin = end
        text(xs[-1] + CELL + 20, top + 15, f"worker {lane % WORKERS} of {WORKERS}", 'class="note"')
    height = y + 30 + LANES * (CELL + 10) + 10
    width = LEFT * 2 + order.samples * CELL + 8 * LANES
    style = (
        "text{font:14px sans-serif;fill:#222}.id{font-size:11px;fill:#000}.note{font-size:12px;fill:#555}"
        ".block{fill:none;stroke:#222;stroke-width:1.5}"
    )
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">\n'
        f'<style>{style}</style>\n<rect width="100%" height="100%" fill="#fff"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )
    (Path(__file__).parent / "images/order.svg").write_text(svg)


if __name__ == "__main__":
    main()
