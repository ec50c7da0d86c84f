"""Makes docs/correction.png with the built host-demo: for each prompt, a row of seeds without the plugin and one with it.

    cargo build --release && python docs/correction.py        (needs Pillow)

The prompts are the first pair, the first relation and the first count in tests/captions.txt.
"""
import pathlib, subprocess, tempfile

from PIL import Image, ImageDraw

ROOT = pathlib.Path(__file__).resolve().parent.parent
SEEDS, SCALE, ETA = 6, 2, 4


def draw(folder, prompt, options):
    out = pathlib.Path(folder) / "image.png"
    subprocess.run([ROOT / "target/release/host-demo", "generate", "--prompt", prompt, "--batch", str(SEEDS), "--out", out,
                    *options], check=True, cwd=ROOT, stderr=subprocess.DEVNULL)
    images = [Image.open(out.with_name(f"image-{i}.png")) for i in range(SEEDS)]
    return [image.resize((image.width * SCALE, image.height * SCALE), Image.NEAREST) for image in images]


def main():
    captions = (ROOT / "tests/captions.txt").read_text().splitlines()
    first = lambda words: next(c for c in captions if any(w in c for w in words))
    prompts = [first([" and "]), first([" left of ", " right of ", " above ", " below "]), first(["two ", "three "])]
    side, label, gap = 64 * SCALE, 22, 4
    sheet = Image.new("RGB", (SEEDS * (side + gap) + gap + 84, len(prompts) * (label + 2 * (side + gap) + gap)), "white")
    pen = ImageDraw.Draw(sheet)
    y = 0
    with tempfile.TemporaryDirectory() as folder:
        for prompt in prompts:
            pen.text((88, y + 5), prompt, fill="black")
            y += label
            for name, options in (("without", ["--no-plugin"]), (f"eta {ETA}", ["--eta", str(ETA)])):
                pen.text((8, y + side // 2 - 6), name, fill="black")
                for i, image in enumerate(draw(folder, prompt, options)):
                    sheet.paste(image, (84 + gap + i * (side + gap), y))
                y += side + gap
            y += gap
    sheet.save(ROOT / "docs/correction.png", optimize=True)


if __name__ == "__main__":
    main()
