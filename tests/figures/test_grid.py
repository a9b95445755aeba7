"""Images in rows and columns: what is drawn over them lies where their tokens are, and fits."""

import pytest
import torch

from signal_reid.figures.grid import HEADS, draw_marked, image_grid, outline, strokes
from signal_reid.figures.style import WIDTHS, drawing_style

AREA = (2.0, 4.0, 42.0, 24.0)  # rows of 10 pixels, columns of 5, beginning at row 2 and column 4


@pytest.fixture
def cells():
    return torch.tensor([[1, 0, 0, 1], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]], dtype=torch.bool)


def inside(cells, x, y):
    """Whether a point in pixels lies in a marked cell."""
    row, column = int((y - AREA[0]) // 10), int((x - AREA[1]) // 5)
    return 0 <= row < 4 and 0 <= column < 4 and bool(cells[row, column])


def test_every_segment_of_an_outline_parts_a_marked_cell_from_one_that_is_not(cells):
    for (x0, y0), (x1, y1) in outline(cells, AREA):
        x, y, dx, dy = (x0 + x1) / 2, (y0 + y1) / 2, float(x0 == x1), float(y0 == y1)
        assert inside(cells, x - dx, y - dy) != inside(cells, x + dx, y + dy)


def test_an_outline_is_as_long_as_the_marked_cells_have_free_sides(cells):
    marked = {(r, c) for r, c in cells.nonzero().tolist()}
    sides = [(r + i, c + j) for r, c in marked for i, j in ((0, 1), (1, 0), (0, -1), (-1, 0))]
    assert len(outline(cells, AREA)) == sum(side not in marked for side in sides)


def test_each_marked_cell_is_struck_through_once(cells):
    middles = [((x0 + x1) / 2, (y0 + y1) / 2) for (x0, y0), (x1, y1) in strokes(cells, AREA)]
    assert len(middles) == int(cells.sum())
    assert all(inside(cells, x, y) for x, y in middles)


def test_the_veil_covers_exactly_what_is_not_marked(cells):
    with drawing_style():
        grid = image_grid(["a"], [""], ["row"], ["column"], 2.0)
        axes = grid.axes[0][0][0][0]
        axes.set(xlim=(0, 28), ylim=(44, 0))
        draw_marked(axes, cells, AREA)
    (veil,) = axes.images
    assert torch.equal(torch.as_tensor(veil.get_array()[..., 3]) == 0, cells)
    assert veil.get_extent() == [4.0, 24.0, 42.0, 2.0]
    assert axes.get_xlim() == (0, 28)
    assert axes.get_ylim() == (44, 0)


@pytest.mark.parametrize(
    ("groups", "blocks", "columns", "aspect"),
    [(1, 1, 2, 2.0), (1, 1, 3, 0.5), (2, 1, 2, 2.0), (1, 2, 3, 2.0), (3, 1, 5, 0.5)],
)
def test_images_keep_their_shape_and_do_not_touch(groups, blocks, columns, aspect):
    titles = ["before", "after"][:blocks] if blocks > 1 else [""]
    with drawing_style():
        grid = image_grid(
            [str(i) for i in range(groups)], titles, list("abc"), list("vwxyz")[:columns], aspect, captions=[1]
        )
    width, height = grid.figure.get_size_inches()
    assert width == pytest.approx(WIDTHS["column" if groups * blocks * columns <= 4 else "page"])
    assert height <= 9.1  # a paper's page
    boxes = [axes.get_position() for axes in grid.figure.axes]
    assert len(boxes) == groups * blocks * columns * 3
    for box in boxes:
        assert box.height * height / (box.width * width) == pytest.approx(aspect)
        assert min(box.x0, box.y0, 1 - box.x1, 1 - box.y1) >= 0
    for i, box in enumerate(boxes):
        for other in boxes[:i]:
            beside = box.x0 >= other.x1 or other.x0 >= box.x1
            assert beside or (box.y0 >= other.y1 or other.y0 >= box.y1)
    first, second = grid.axes[0][0][1][0].get_position(), grid.axes[0][0][2][0].get_position()
    assert (first.y0 - second.y1) * height >= HEADS  # there is room for the line of text
