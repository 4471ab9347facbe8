"""The documentation: what it links to exists, its config keys are known, its code runs."""

import re
from urllib.parse import unquote

import pytest
from detectron2.config import get_cfg
from detectron2.utils.env import seed_all_rng

from ssd.config import add_ssd_config, read_config
from ssd.engine import Trainer

PAGES = ["README.md", "docs/*.md"]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"(?ms)^```.*?^```|`[^`\n]*`")
# Of the messages that docs/troubleshooting.md explains, as the source has them.
MESSAGES = [
    " classes start from those of ",
    "the name of a class of MODEL.WEIGHTS",
    " doesn't fill the model: ",
    "it is a web page, not the weights; download them again",
    ": no download from ",
    " into the current folder, ",
    " is neither in DATASETS.REGISTER nor known ",
    "names and order must agree (",
    "cx cy w h aren't fractions from 0 to 1",
    " pixels, but its ",
    " is truncated (",
    "loss is not finite at iteration ",
    "Lower SOLVER.BASE_LR or raise SOLVER.WARMUP_ITERS if the images are fine.",
    "Learning rate scaled to ",
    " must be a positive multiple of the ",
    "unknown config key ",
    ": is --dataset the one that was evaluated?",
    "They would fit as x1, y1, x2, y2, but COCO's are x, y, width, height.",
    " without area or outside the image",
    ": another process is training there; give this one another",
]


@pytest.fixture(scope="module")
def pages(repo):
    """Path and text of each page."""
    found = {path: path.read_text() for pattern in PAGES for path in repo.glob(pattern)}
    assert len(found) > 5
    return found


def anchors(text):
    """Names of a page's headings, as GitHub makes them."""
    headings = re.findall(r"(?m)^#+ +(.*)$", re.sub(r"(?ms)^```.*?^```", "", text))
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


def test_links_and_images_exist(repo, pages):
    count = 0
    for page, text in pages.items():
        for link in LINK.findall(CODE.sub("", text)):
            name, _, anchor = unquote(link).partition("#")
            if re.match(r"\w+:", link):
                continue
            count += 1
            target = (page.parent / name).resolve() if name else page
            assert target.exists() and repo in target.parents, f"{page}: {link}"
            if anchor:
                assert anchor in anchors(target.read_text()), f"{page}: {link}"
    assert count > 30


def test_images_are_used(repo, pages):
    images = {path.name for path in (repo / "docs" / "images").iterdir()}
    links = {link.rsplit("/")[-1] for text in pages.values() for link in LINK.findall(text)}
    assert images <= links


def test_config_keys_exist(pages):
    """A sentence may shorten keys, an option may not."""
    cfg = get_cfg()
    add_ssd_config(cfg)
    count = 0
    for page, text in pages.items():
        if page.name not in ("tutorial.md", "troubleshooting.md", "custom_loop.md"):
            continue
        pattern = r"\b(?:MODEL|DATASETS|INPUT|DATALOADER|SOLVER|TEST|WANDB)(?:\.[A-Z][A-Z0-9_]*)+\b"
        for key in re.findall(pattern, re.sub(r"unknown config key \S+", "", text)):
            node, count = cfg, count + 1
            for part in re.sub(r"(REGISTER)\..*", r"\1", key).split("."):
                assert part in node, f"{page}: {key}"
                node = node[part]
    assert count > 30


def test_tools_and_their_options_exist(repo, pages):
    """Each ``--option`` behind a tool's name in a command is one of that tool's arguments."""
    count = 0
    for page, text in pages.items():
        for code in re.findall(r"(?ms)^```bash\n(.*?)^```", text):
            for line in code.replace("\\\n", " ").splitlines():
                for tool, rest in re.findall(r"(tools/[\w/]+\.py)([^|#]*)", line):
                    source = (repo / tool).read_text()
                    for option in re.findall(r"(--[a-z][\w-]*)", rest):
                        assert f'"{option}"' in source, f"{page}: {tool} {option}"
                        count += 1
    assert count > 10


def test_configs_of_the_tutorial(repo, tmp_path):
    blocks = re.findall(r"(?ms)^```yaml\n(.*?)^```", (repo / "docs/tutorial.md").read_text())
    blocks = [block for block in blocks if block.startswith("_BASE_: ../")]
    assert len(blocks) == 2
    for block, classes in zip(blocks, (3, 2)):
        path = tmp_path / "config.yaml"
        path.write_text(block.replace("_BASE_: ..", f"_BASE_: {repo}/labs"))
        assert read_config(str(path)).MODEL.SSD.NUM_CLASSES == classes


def test_messages_are_the_projects(repo):
    page = (repo / "docs/troubleshooting.md").read_text()
    folders = [repo / "ssd", repo / "tools"]
    source = "\n".join(path.read_text() for folder in folders for path in folder.rglob("*.py"))
    for message in MESSAGES:
        assert message.strip() in page and message in source, message


def test_custom_loop(repo, tiny_cfg, tmp_path, assert_equal):
    """It trains as the Trainer does, bit by bit, evaluates, and resumes."""
    (code,) = re.findall(r"(?ms)^```python\n(.*?)^```", (repo / "docs/custom_loop.md").read_text())
    assert len(code.splitlines()) < 65
    loop = {"__name__": "custom_loop"}
    exec(compile(code, "docs/custom_loop.md", "exec"), loop)
    opts = ["SOLVER.MAX_ITER", 2, "SOLVER.CHECKPOINT_PERIOD", 1, "SEED", 1]
    folders = [str(tmp_path / name) for name in ("loop", "trainer")]
    cfg, other = (tiny_cfg(*opts, "OUTPUT_DIR", folder) for folder in folders)
    (tmp_path / "loop").mkdir()
    model = loop["train"](cfg)
    assert len((tmp_path / "loop/metrics.json").read_text().splitlines()) == 1
    assert (tmp_path / "loop/inference/shapes_val/coco_instances_results.json").is_file()
    seed_all_rng(cfg.SEED)
    trainer = Trainer(other)
    trainer.resume_or_load()
    trainer.train()
    assert_equal(model.state_dict(), trainer.model.state_dict())
    (tmp_path / "loop/last_checkpoint").write_text("model_0000000.pth")
    assert_equal(loop["train"](cfg, resume=True).state_dict(), trainer.model.state_dict())
