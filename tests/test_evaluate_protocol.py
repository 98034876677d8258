"""DreamBooth's protocol against the published file, folders of subjects, masks and what is refused."""

from collections import Counter
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moma.evaluate import protocol
from moma.evaluate.protocol import ProtocolConfig, limited, open_dataset, pairs_of, prompts_for, tasks_of
from moma.evaluate.references import Masks, Reference, find_references
from moma.inputs.preprocess import make_reference
from tests.helpers import image as example
from tests.helpers import mask

# Of the lines of google/dreambooth's dataset/prompts_and_classes.txt (commit e9b8c01): "folder,class", then
# both lists of prompts with {} in the place of token and class.
OFFICIAL = ("6f902d00493ae35a", "351df13940ddefc3", "4ba00988f0dc5dfb")


def digest(lines: list[str]) -> str:
    return sha256("\n".join(lines).encode()).hexdigest()[:16]


def dreambooth(folder: Path) -> Path:
    """The published folders, with empty files in the place of photos."""
    six = ("backpack", "berry_bowl", "can", "clock", "dog2", "dog3", "fancy_boot", "pink_sunglasses")
    numbers = dict.fromkeys((*six, "shiny_sneaker", "vase"), 6) | {"duck_toy": 4, "red_cartoon": 4}
    for name in protocol.CLASSES:
        (folder / name).mkdir(parents=True)
        for i in range(numbers.get(name, 5)):
            (folder / name / f"{i:02}.jpg").touch()
    return folder


def official_file() -> str:
    """As it is published."""
    head = "\n".join(f"{name},{word}" for name, word in protocol.CLASSES.items())
    lists = (protocol.PLACES_OF_OBJECTS, protocol.OUTFITS)
    texts = []
    for own in lists:
        lines = [text.replace("{}", "{0} {1}") for text in (*protocol.PLACES, *own, *protocol.PROPERTIES)]
        body = ",\n".join(f"'{line}'.format(unique_token, class_token)" for line in lines)
        texts.append(f"prompt_list = [\n{body}\n]\n")
    return (
        f"Classes\n\nsubject_name,class\n{head}\n\nPrompts\n\nObject Prompts\n\n{texts[0]}\n"
        f"Live Subject Prompts\n\n{texts[1]}"
    )


def test_lists_are_the_published_ones() -> None:
    classes, objects, live = protocol.read_official(official_file())
    lines = [f"{name},{word}" for name, word in classes.items()]
    assert (digest(lines), digest(objects), digest(live)) == OFFICIAL
    assert len(classes) == 30 and len(set(classes.values())) == 15 and len(objects) == len(live) == 25
    assert sum(word in protocol.LIVE for word in classes.values()) == 9


def test_what_systems_leave_behind_is_no_subject_and_no_photo(tmp_path: Path) -> None:
    expected = open_dataset(dreambooth(tmp_path / "dataset"))
    (tmp_path / "dataset" / "__MACOSX").mkdir()
    (tmp_path / "dataset" / "cat" / "._00.jpg").touch()
    assert open_dataset(tmp_path / "dataset") == expected


def test_counts_of_the_whole_protocol(tmp_path: Path) -> None:
    subjects = open_dataset(dreambooth(tmp_path / "dataset"), added=False)
    assert len(subjects) == 30 and sum(len(s.photos) for s in subjects) == 158
    tasks = tasks_of(subjects, per_prompt=4)
    assert len(tasks) == 3000 and len({task.file for task in tasks}) == 3000
    assert Counter(task.kind for task in tasks) == {"context": 2400, "texture": 600}
    with_added = tasks_of(open_dataset(tmp_path / "dataset"), 4)
    assert Counter(task.kind for task in with_added) == {"context": 2400, "texture": 1800}


def test_the_whole_dataset_is_known_by_its_photos(tmp_path: Path) -> None:
    subjects = open_dataset(dreambooth(tmp_path))
    assert protocol.is_dreambooth(subjects) and not protocol.is_dreambooth(subjects[1:])
    (tmp_path / "vase" / "05.jpg").unlink()
    assert not protocol.is_dreambooth(open_dataset(tmp_path))


def test_prompts_of_a_live_subject_and_an_object() -> None:
    dog, toy = prompts_for("dog", live=True), prompts_for("stuffed animal", live=False)
    texts = [prompt.text for prompt in dog]
    assert "a dog wearing a black top hat and a monocle" in texts and "a cube shaped dog" in texts
    assert "a dog floating in an ocean of milk" not in texts and "a dog made of glass" in texts
    assert ("a stuffed animal with the Eiffel Tower in the background", "context") in [
        (p.text, p.kind) for p in toy
    ]
    assert all(p.kind == "texture" for p in toy if "shiny" in p.text or "made of" in p.text)


def test_tasks_name_files_seeds_and_references(tmp_path: Path) -> None:
    vase, *_ = [s for s in open_dataset(dreambooth(tmp_path)) if s.name == "vase"]
    tasks = tasks_of([vase], per_prompt=8)
    third = tasks[2]
    assert str(third.file) == "vase/a-vase-in-the-jungle-2.png" and third.number == 2
    assert {photo.name for task in tasks for photo in task.photos("first")} == {"00.jpg"}
    names = [photo.name for task in tasks[:8] for photo in task.photos("each")]
    assert names == ["00.jpg", "01.jpg", "02.jpg", "03.jpg", "04.jpg", "05.jpg", "00.jpg", "01.jpg"]
    assert ProtocolConfig().strength("context") == 1.0 and ProtocolConfig().strength("texture") == 0.4


def test_pairs(tmp_path: Path) -> None:
    """Of DreamBooth's list, in the contexts that both have; of other subjects, all of different classes."""
    subjects = open_dataset(dreambooth(tmp_path))
    pairs = {pair.name: pair for pair in pairs_of(subjects)}
    assert len(pairs) == 8 * 7 // 2 and len({word for pair in pairs.values() for word in pair.words}) == 8
    mixed, alive = pairs["cat-and-teapot"], pairs["cat-and-dog"]
    assert mixed.words == ("cat", "teapot") and len(mixed.photos) == 10
    texts = [prompt.text for prompt in mixed.prompts]
    assert texts == [text.format("cat and a teapot") for text in protocol.PLACES]
    assert "a cat and a dog in a chef outfit" in [prompt.text for prompt in alive.prompts]
    assert {prompt.kind for prompt in alive.prompts} == {"context"}
    task = tasks_of([mixed], per_prompt=7)[6]
    assert [photo.name for photo in task.photos("each")] == ["01.jpg", "01.jpg"]
    assert [photo.parent.name for photo in task.photos("first")] == ["cat", "teapot"]
    (few,) = limited([mixed], 1, (2,))
    assert few.words == mixed.words and len(few.prompts) == 2

    few = [subject for subject in subjects if subject.name in ("dog", "dog2", "can")]
    assert [pair.name for pair in pairs_of(few)] == ["can-and-dog", "can-and-dog2"]
    with pytest.raises(ValueError, match="2 subjects"):
        pairs_of(few[1:])


def test_limits(tmp_path: Path) -> None:
    subjects = open_dataset(dreambooth(tmp_path))
    few = limited(subjects, 2, (3, 1))
    assert [s.name for s in few] == ["backpack", "backpack_dog"]
    assert [p.text for p in few[0].prompts] == [
        "a backpack in the jungle", "a backpack in the snow", "a backpack on the beach", "a red backpack",
    ]  # fmt: skip
    assert [p.kind for p in limited(subjects, 1, (1,))[0].prompts] == ["context", "texture"]
    assert [p.kind for p in limited(subjects, 1, (0, 2))[0].prompts] == ["texture"] * 2
    for number, prompts in ((0, None), (None, (0,)), (None, (-1, 2)), (None, (1, 2, 3))):
        with pytest.raises(ValueError, match="expected"):
            limited(subjects, number, prompts)


def test_own_subjects_and_folders_that_do_not_fit(tmp_path: Path) -> None:
    def refused(words: str) -> None:
        with pytest.raises(ValueError, match=words):
            open_dataset(tmp_path)

    (tmp_path / "my_mug").mkdir()
    refused("my_mug.*subjects.json")
    own = tmp_path / "subjects.json"
    own.write_text('{"my_mug": "mug", "my_hat": "hat"}')
    refused("my_hat")
    own.write_text('{"my_mug": 3}')
    refused("subjects.json")
    own.write_text("{")
    refused("JSON")
    own.write_text('{"my_mug": "mug"}')
    refused("my_mug")
    (tmp_path / "my_mug" / "b.PNG").touch()
    (tmp_path / "my_mug" / "a.jpg").touch()
    (tmp_path / "my_mug" / "notes.txt").touch()
    (tmp_path / "my_mug" / "a.webp").touch()
    refused("my_mug/a: 2 images")
    (tmp_path / "my_mug" / "a.webp").unlink()
    (subject,) = open_dataset(tmp_path)
    assert [path.name for path in subject.photos] == ["a.jpg", "b.PNG"] and subject.word == "mug"
    own.unlink()
    (tmp_path / "my_mug").rename(tmp_path / "cat")
    (tmp_path / protocol.OFFICIAL).write_text(official_file())
    assert open_dataset(tmp_path)[0].word == "cat"
    (tmp_path / protocol.OFFICIAL).write_text(official_file().replace("wet", "dry"))
    refused(protocol.OFFICIAL)
    with pytest.raises(ValueError, match="nowhere"):
        open_dataset(tmp_path / "nowhere")


# --- masks -------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    """Two photos without any hint, one with transparency, one on a plain background."""
    folder = tmp_path / "data" / "cat"
    folder.mkdir(parents=True)
    plain = Image.composite(example(3), Image.new("RGB", (120, 90), "white"), mask(30))
    clear = example(2)
    clear.putalpha(mask(20))
    images = {"a.jpg": example(0), "b.jpg": example(1), "c.png": clear, "d.png": plain}
    for name, one in images.items():
        one.save(folder / name)
    return [folder / name for name in images]


def check(image: Image.Image, mask: Image.Image) -> None:
    make_reference(image, mask, 64)


def found(photos: list[Path], masks: Masks, out: Path) -> dict[str, int]:
    """How many pixels of each one are subject."""
    references = find_references(photos, masks, out, check)
    return {
        photo.name: int((np.asarray(Image.open(one.mask)) > 127).sum()) for photo, one in references.items()
    }


def area(radius: int) -> int:
    return int((np.asarray(mask(radius)) > 127).sum())


def test_masks_come_from_files_then_transparency_then_the_segmenter(
    photos: list[Path], tmp_path: Path
) -> None:
    given = tmp_path / "given" / "cat"
    given.mkdir(parents=True)
    mask(10).save(given / "a.png")
    asked = []

    def segment(image: Image.Image) -> Image.Image:
        asked.append(image.size)
        return mask(15)

    masks = Masks(tmp_path / "given", segment, "weights 1")
    expected = {"a.jpg": area(10), "b.jpg": area(15), "c.png": area(20), "d.png": area(15)}
    assert found(photos, masks, tmp_path / "out") == expected and len(asked) == 2
    assert found(photos, masks, tmp_path / "out") == expected and len(asked) == 2, "found once"
    other = Masks(tmp_path / "given", segment, "weights 2")
    assert found(photos, other, tmp_path / "out") == expected and len(asked) == 4
    plain = found(photos[2:], Masks(), tmp_path / "out")
    assert plain["c.png"] == area(20) and plain["d.png"] == pytest.approx(area(30), rel=0.02)


def test_masks_of_odd_names_and_where_they_are_from(photos: list[Path], tmp_path: Path) -> None:
    given = tmp_path / "given" / "cat"
    given.mkdir(parents=True)
    odd = photos[0].rename(photos[0].with_name("IMG [1].jpg"))
    mask(10).save(given / "IMG [1].png")
    for _ in range(2):  # found, then found again
        masks = Masks(tmp_path / "given", lambda image: mask(15))
        references = find_references([odd, *photos[1:3]], masks, tmp_path / "out", check)
        assert [one.source for one in references.values()] == ["file", "sam", "alpha"]


def test_references_are_known_by_their_pixels(photos: list[Path], tmp_path: Path) -> None:
    """Another Pillow's PNG of the same mask is the same mask."""
    covers = [tmp_path / f"{i}.png" for i in range(3)]
    for path, radius, level in zip(covers, (20, 20, 21), (1, 9, 1), strict=True):
        mask(radius).save(path, compress_level=level)
    assert covers[0].read_bytes() != covers[1].read_bytes()
    first, again, other = (Reference.of(photos[0], path, "file").digest for path in covers)
    assert first == again != other and first != Reference.of(photos[1], covers[0], "file").digest


def test_images_without_a_mask_are_named_together(photos: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^2 of 4 images .*a.jpg, .*b.jpg .*--masks"):
        find_references(photos, Masks(), tmp_path / "out", check)
    (tmp_path / "masks").mkdir()
    with pytest.raises(ValueError, match=r"masks: .*cat/a.png"):
        find_references(photos, Masks(tmp_path / "masks"), tmp_path / "out", check)
    (tmp_path / "masks" / "cat").mkdir()
    Image.new("L", (300, 90), 255).save(tmp_path / "masks" / "cat" / "d.png")
    with pytest.raises(ValueError, match=r"^1 of 1 images .*d.png .*300x90"):
        find_references(photos[3:], Masks(tmp_path / "masks"), tmp_path / "out", check)
