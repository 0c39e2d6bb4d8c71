"""An image that shows something, drawn by hand, so that none has to be kept: a goldfish in its tank."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFilter


def goldfish(width: int = 960, height: int = 720) -> Image.Image:
    """RGB, the same every time."""
    rng = np.random.default_rng(3)
    W, H = 960, 720
    depth = np.linspace(0, 1, H)[:, None, None]
    water = (1 - depth) * np.array([150, 205, 200]) + depth * np.array([25, 75, 70])
    light = np.kron(rng.normal(0, 9, (12, 16, 1)), np.ones((60, 60, 1)))
    image = Image.fromarray(np.clip(water + light, 0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(22))
    draw = ImageDraw.Draw(image)
    for x in range(-40, W, 26):  # gravel
        y = 655 + int(rng.integers(-12, 14))
        grey = int(rng.integers(70, 150))
        draw.ellipse((x, y, x + 70, y + 90), fill=(grey, grey - 12, grey - 30))
    for x in (90, 150, 830, 885):  # weed
        points = [(x + int(14 * np.sin(k / 2.0 + x)), 690 - 26 * k) for k in range(18)]
        draw.line(points, fill=(40, 110, 55), width=13, joint="curve")
    # Tail, fins, body, from the back to the front
    draw.polygon([(620, 370), (850, 225), (800, 375), (855, 540)], fill=(236, 120, 30))
    draw.polygon([(650, 372), (800, 300), (770, 375), (800, 470)], fill=(250, 160, 70))
    draw.polygon([(360, 262), (470, 130), (590, 190), (600, 290)], fill=(240, 125, 30))
    draw.polygon([(430, 480), (500, 585), (560, 470)], fill=(240, 130, 40))
    draw.ellipse((180, 225, 690, 520), fill=(244, 128, 24))
    draw.ellipse((205, 340, 640, 518), fill=(253, 178, 84))
    draw.ellipse((200, 232, 670, 455), fill=(246, 134, 28))
    for row in range(5):  # scales
        for column in range(9):
            x, y = 320 + 36 * column + 18 * (row % 2), 262 + 34 * row
            if (x + 20 - 435) ** 2 / 215**2 + (y + 20 - 350) ** 2 / 105**2 < 1:
                draw.arc((x, y, x + 42, y + 40), 285, 75, fill=(206, 92, 12), width=3)
    draw.arc((235, 255, 375, 495), 290, 70, fill=(196, 84, 10), width=6)  # gill
    draw.polygon([(370, 400), (480, 445), (430, 500), (365, 440)], fill=(230, 110, 25))
    draw.ellipse((226, 300, 286, 360), fill=(255, 236, 190))
    draw.ellipse((240, 312, 276, 348), fill=(15, 15, 20))
    draw.ellipse((246, 316, 257, 327), fill=(255, 255, 255))
    draw.arc((165, 370, 235, 425), 300, 60, fill=(150, 55, 5), width=6)  # mouth
    for x, y, r in ((130, 250, 14), (112, 190, 19), (140, 120, 24)):  # bubbles
        draw.ellipse((x - r, y - r, x + r, y + r), outline=(225, 245, 245), width=4)
    return image.filter(ImageFilter.GaussianBlur(1.2)).resize((width, height), Image.Resampling.LANCZOS)
