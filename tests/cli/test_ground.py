import gc
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

QUERY = "Where is it?"


def test_found_prints_box_points_score_and_exits_0(cli, picture, finding_bundle):
    done = cli("ground", picture, QUERY, "-b", finding_bundle)
    assert done.code == 0
    assert done.out.startswith(f"{picture}: found\n")
    for word in ("box", "points", "predicted IoU", "not a probability", "ms"):
        assert word in done.out
    assert "area" not in done.out  # a PNG has no spacing


def test_absent_says_so_and_exits_1(cli, picture, absent_bundle):
    done = cli("ground", picture, QUERY, "-b", absent_bundle)
    assert done.code == 1
    assert "not in this image" in done.out
    assert "box" not in done.out


def test_collecting_goes_on_after_the_start(cli, picture, finding_bundle, monkeypatch):
    seen = []
    real = "medreasoner_cli.batch.Question.ask"
    monkeypatch.setattr(real, lambda *_: seen.append(gc.isenabled()) or 1 / 0)
    assert cli("ground", picture, QUERY, "-b", finding_bundle).code == 4
    assert cli("ground", picture, QUERY, "-b", "no such bundle").code == 4
    assert seen == [True]
    assert gc.isenabled()


def test_notice_of_the_weights_is_one_line_on_stderr(cli, picture, finding_bundle):
    done = cli("ground", picture, QUERY, "-b", finding_bundle)
    assert done.err.splitlines() == ["note: toy 0.1.0: random weights, for tests only"]


def test_json_is_the_answer_on_one_line(cli, picture, finding_bundle):
    done = cli("ground", picture, QUERY, "-b", finding_bundle, "--json")
    (line,) = done.out.splitlines()
    answer = json.loads(line)
    assert answer["found"] is True
    assert answer["image"] == str(picture)
    assert answer["model"]["name"] == "toy"
    assert answer["mask"]["size"] == [60, 80]
    assert QUERY not in line


def test_bundle_may_come_from_the_environment(cli, picture, absent_bundle, monkeypatch):
    monkeypatch.setenv("MEDREASONER_BUNDLE", absent_bundle)
    assert cli("ground", picture, QUERY).code == 1


def test_bundle_may_be_named_in_the_folder_of_bundles(cli, picture, absent_bundle, monkeypatch):
    monkeypatch.setenv("MEDREASONER_BUNDLES", str(Path(absent_bundle).parent))
    assert cli("ground", picture, QUERY, "-b", "absent").code == 1


def test_outputs_are_written_by_their_endings(cli, picture, finding_bundle, tmp_path):
    names = ["o.png", "o.mask.png", "o.json", "o.rle.json"]
    outputs = [part for name in names for part in ("-o", tmp_path / name)]
    done = cli("ground", picture, QUERY, "-b", finding_bundle, *outputs)
    assert done.code == 0
    assert all(f"wrote    {tmp_path / name}" in done.out for name in names)
    with Image.open(tmp_path / "o.mask.png") as mask:
        assert mask.size == (80, 60)
        assert set(np.unique(np.asarray(mask))) <= {0, 255}
    assert json.loads((tmp_path / "o.json").read_text())["found"] is True


def test_thought_is_shown_when_asked_for(cli, picture, finding_bundle):
    done = cli("ground", picture, QUERY, "-b", finding_bundle, "--think")
    # Random weights may think up to the limit, which is an error of the model's; both are answers to the flag.
    assert "thought" in done.out or done.code == 4


def test_thought_about_one_image_is_printed_while_it_comes(cli, picture, finding_bundle, monkeypatch, capfd):
    import medreasoner

    told = []

    def stream(self, image, query, **options):
        assert options["think"] is True
        yield medreasoner.Thought("  It is\n")
        yield medreasoner.Thought("the\x1b[31m liver. ")
        told.append(capfd.readouterr().out)
        yield self.ground(image, query)

    monkeypatch.setattr(medreasoner.Grounder, "stream", stream)
    done = cli("ground", picture, QUERY, "-b", finding_bundle, "--think")
    assert told == ["  thought  It is the?[31m liver. "]
    assert done.code == 0
    assert done.out.startswith(f"\n{picture}: found\n")  # the end of the thought's line
    assert "  thought" not in done.out


def test_thought_that_ends_in_an_error_ends_its_line(cli, picture, finding_bundle, monkeypatch):
    import medreasoner

    def stream(*_args, **_options):
        yield medreasoner.Thought("It is")
        raise medreasoner.GenerationError("no answer")

    monkeypatch.setattr(medreasoner.Grounder, "stream", stream)
    done = cli("ground", picture, QUERY, "-b", finding_bundle, "--think")
    assert (done.code, done.out) == (4, "  thought  It is\n")
    assert "no answer" in done.err
    done = cli("ground", picture, QUERY, "-b", finding_bundle, "--think", "--json")
    assert json.loads(done.out)["error"]  # nothing before the object


def test_standard_input_is_read(cli, picture, finding_bundle, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(picture.read_bytes())))
    done = cli("ground", "-", QUERY, "-b", finding_bundle)
    assert done.code == 0
    assert done.out.startswith("stdin: found")


# Several images


@pytest.fixture
def folder(tmp_path, picture):
    root = tmp_path / "in"
    (root / "deep").mkdir(parents=True)
    (root / ".hidden").mkdir()
    for name in ("b.png", "deep/c.png", ".d.png", ".hidden/e.png"):
        (root / name).write_bytes(picture.read_bytes())
    (root / "DICOMDIR").write_bytes(b"not an image")
    return root


def test_folder_is_searched_without_hidden_files(cli, folder, finding_bundle):
    done = cli("ground", folder, QUERY, "-b", finding_bundle)
    assert done.code == 0
    assert [line.split()[0] for line in done.out.splitlines()] == [f"{folder}/b.png", f"{folder}/deep/c.png"]


def test_pattern_is_expanded(cli, folder, finding_bundle):
    done = cli("ground", f"{folder}/**/*.png", QUERY, "-b", finding_bundle, "--json")
    assert [Path(json.loads(line)["image"]).name for line in done.out.splitlines()] == ["b.png", "c.png"]


def test_failing_image_is_reported_and_the_others_go_on(cli, folder, finding_bundle):
    (folder / "a.png").write_bytes(b"no image at all")
    done = cli("ground", folder, QUERY, "-b", finding_bundle, "--json")
    assert done.code == 3
    assert sum(line.startswith("error: ") for line in done.err.splitlines()) == 1
    answers = [json.loads(line) for line in done.out.splitlines()]
    assert [("error" in answer, Path(answer["image"]).name) for answer in answers] == [
        (True, "a.png"),
        (False, "b.png"),
        (False, "c.png"),
    ]


def test_exit_code_is_that_of_the_gravest(cli, picture, absent_bundle):
    assert cli("ground", picture, picture, QUERY, "-b", absent_bundle).code == 1


@pytest.mark.parametrize("as_template", [False, True])
def test_several_images_write_into_a_folder_or_by_a_template(cli, folder, finding_bundle, tmp_path, as_template):
    out = tmp_path / "out"
    out.mkdir()
    output = f"{out}/{{stem}}-{{index}}.mask.png" if as_template else out
    assert cli("ground", folder, QUERY, "-b", finding_bundle, "-o", output).code == 0
    expected = ["b-0000.mask.png", "c-0001.mask.png"] if as_template else ["b.png", "c.png"]
    assert sorted(path.name for path in out.iterdir()) == expected


def test_form_of_a_folder_can_be_chosen(cli, folder, finding_bundle, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    assert cli("ground", folder, QUERY, "-b", finding_bundle, "-o", f"{out}/", "--format", "rle").code == 0
    assert sorted(path.name for path in out.iterdir()) == ["b.rle.json", "c.rle.json"]


# Wrong usage, unreadable input, trouble: one line each, and nothing loaded where it can be known before


def _failed(done, code, text):
    assert done.code == code
    assert done.out == ""
    (line,) = [line for line in done.err.splitlines() if not line.startswith("note: ")]
    assert line.startswith("error: ")
    assert text in line


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        pytest.param(["ground"], 2, "one image or more", id="nothing"),
        pytest.param(["ground", "a.png"], 2, "one image or more", id="no query"),
        pytest.param(["ground", "a.png", "x", "--nope"], 2, "--nope", id="unknown option"),
        pytest.param(["ground", "a.png", "x", "--device", "tpu"], 2, "tpu", id="unknown device"),
        pytest.param(["ground", "a.png", "x", "--frame", "-1"], 2, "--frame", id="negative frame"),
        pytest.param(["ground", "a.png", "x", "-o", "nowhere/b.png"], 2, "no folder", id="output folder missing"),
        pytest.param(["ground", "a.png", "x", "-o", "b.xyz"], 2, "known: ", id="unknown ending"),
        pytest.param(["ground", "a.png", "x", "-o", "a.png"], 2, "not written over", id="output is the input"),
        pytest.param(["ground", "a.png", "a.png", "x", "-o", "b.png"], 2, "{stem}", id="one output for several"),
        pytest.param(["ground", "a.png", "a.png", "x", "-o", "empty/"], 2, "{index}", id="two outputs of one name"),
        pytest.param(["ground", "a.png", "where", "is", "it"], 2, "in quotes", id="query without quotes"),
        pytest.param(["ground", "a.png", "x", "-o", ""], 2, "output is empty", id="empty output"),
        pytest.param(["ground", "a.png", "x", "-b", ""], 4, "bundle is empty", id="empty bundle"),
        pytest.param(["ground", "a.png", "x", "--format", "mask"], 2, "--output", id="a form of nothing"),
        pytest.param(["ground", "a.png", "x", "-o", "b.png", "-o", "empty/../b.png"], 2, "twice", id="output twice"),
        pytest.param(["ground", "a.png", "x", "-o", "n" * 300 + ".png"], 2, "too long", id="output of too long a name"),
        pytest.param(["ground", "n" * 300 + ".png", "x"], 3, "too long", id="input of too long a name"),
        pytest.param(["ground", "Where is it?", "a.png"], 3, "behind the images", id="query before the image"),
        pytest.param(["ground", "a.png", "x", "-b", "empty"], 4, "empty: no manifest.json", id="no bundle in it"),
        pytest.param(["ground", "none*.png", "x"], 3, "no file matches", id="pattern without a match"),
        pytest.param(["ground", "empty", "x"], 3, "holds no files", id="empty folder"),
        pytest.param(["ground", "a.png", "x", "-b", "nope"], 4, "nope", id="no such bundle"),
        pytest.param(["grond", "a.png", "x"], 2, "'ground'", id="unknown command"),
    ],
)
def test_failure_is_one_line_and_a_code(cli, picture, tmp_path, monkeypatch, arguments, code, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    _failed(cli(*arguments), code, text)


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        pytest.param(["missing.png", QUERY], 3, "missing.png: no such file", id="no such file"),
        pytest.param(["broken.png", QUERY], 3, "broken.png", id="broken file"),
        pytest.param(["a.png", "  "], 2, "empty", id="empty query"),
        pytest.param(["a.png", "word " * 500], 2, "token", id="query too long"),
        pytest.param(["a.png", QUERY, "--frame", "7"], 3, "frame", id="frame that is not there"),
        pytest.param(["a.png", QUERY, "-o", "b.dcm"], 2, "DICOM SEG refers to a DICOM", id="SEG of a PNG"),
    ],
)
def test_failure_with_a_model_is_one_line_and_a_code(
    cli, picture, tmp_path, monkeypatch, finding_bundle, arguments, code, text
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.png").write_bytes(picture.read_bytes()[:100])
    _failed(cli("ground", *arguments, "-b", finding_bundle), code, text)
    assert not (tmp_path / "b.dcm").exists()


def test_altered_bundle_is_exit_code_4(cli, picture, finding_bundle, tmp_path):
    import shutil

    copy = tmp_path / "altered"
    shutil.copytree(finding_bundle, copy)
    with (copy / "segmenter" / "encoder.onnx").open("ab") as file:
        file.write(b"x")
    _failed(cli("ground", picture, QUERY, "-b", copy), 4, "encoder.onnx")


def test_error_that_nobody_foresaw_is_one_line_too(cli, picture, finding_bundle, monkeypatch):
    import medreasoner

    def explode(*_args, **_options):
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr(medreasoner.Grounder, "load", explode)
    _failed(cli("ground", picture, QUERY, "-b", finding_bundle), 4, "RuntimeError: first second")
    monkeypatch.setenv("MEDREASONER_DEBUG", "1")
    with pytest.raises(RuntimeError):
        cli("ground", picture, QUERY, "-b", finding_bundle)


def test_an_unforeseen_error_about_one_image_does_not_stop_the_others(
    cli, folder, finding_bundle, tmp_path, monkeypatch
):
    import medreasoner

    save, calls = medreasoner.Grounding.save, []

    def fail_once(self, path, **options):
        calls.append(path)
        if len(calls) == 2:
            raise ZeroDivisionError("no idea")
        save(self, path, **options)

    monkeypatch.setattr(medreasoner.Grounding, "save", fail_once)
    outputs = ("-o", f"{tmp_path}/{{stem}}.png", "-o", f"{tmp_path}/{{stem}}.json")
    done = cli("ground", folder, QUERY, "-b", finding_bundle, "--json", *outputs)
    assert done.code == 4
    first, second = (json.loads(line) for line in done.out.splitlines())
    assert first == {
        "image": f"{folder}/b.png",
        "error": f"{folder}/b.png: ZeroDivisionError: no idea",
        "written": [f"{tmp_path}/b.png"],
    }
    assert second["written"] == [f"{tmp_path}/c.png", f"{tmp_path}/c.json"]
    assert f"note: written before that: {tmp_path}/b.png" in done.err


def test_errors_of_files_of_one_name_tell_them_apart(cli, tmp_path, finding_bundle):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(b"no image")
    done = cli("ground", tmp_path / "a", tmp_path / "b", QUERY, "-b", finding_bundle)
    errors = [line for line in done.err.splitlines() if line.startswith("error")]
    assert [line.partition(": unknown")[0] for line in errors] == [
        f"error: {tmp_path}/{name}/1.png" for name in ("a", "b")
    ]


def test_a_missing_output_folder_named_with_a_slash_is_made(cli, picture, finding_bundle, tmp_path):
    assert cli("ground", picture, QUERY, "-b", finding_bundle, "-o", f"{tmp_path}/new/deep/").code == 0
    assert [path.name for path in (tmp_path / "new" / "deep").iterdir()] == [f"{picture.stem}.png"]


def test_the_largest_image_is_an_option(cli, picture, finding_bundle):
    _failed(cli("ground", picture, QUERY, "-b", finding_bundle, "--max-pixels", "100"), 3, "--max-pixels")


def test_interrupt_is_130_without_a_word(cli, picture, finding_bundle, monkeypatch):
    import medreasoner

    def interrupt(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(medreasoner.Grounder, "load", interrupt)
    done = cli("ground", picture, QUERY, "-b", finding_bundle)
    assert (done.code, done.out) == (130, "")
    assert "Traceback" not in done.err


def _real_dicom():
    data = pytest.importorskip("pydicom.data")
    return data.get_testdata_file("CT_small.dcm")


def test_dicom_gives_an_area_and_a_segmentation(cli, finding_bundle, tmp_path):
    highdicom = pytest.importorskip("highdicom")
    done = cli("ground", _real_dicom(), QUERY, "-b", finding_bundle, "-o", tmp_path / "o.seg.dcm", "--json")
    assert done.code == 0
    answer = json.loads(done.out)
    assert answer["area_mm2"] is not None
    seg = highdicom.seg.segread(tmp_path / "o.seg.dcm")
    from medreasoner.ops import rle_decode

    assert (seg.pixel_array.squeeze() == rle_decode(answer["mask"])).all()


def test_a_package_that_a_file_needs_is_a_fault_of_that_file(cli, picture, finding_bundle, tmp_path, monkeypatch):
    nifti = tmp_path / "a.nii"
    nifti.write_bytes((348).to_bytes(4, "little") + bytes(340) + b"n+1\0" + bytes(1000))
    monkeypatch.setitem(sys.modules, "nibabel", None)
    monkeypatch.setitem(sys.modules, "highdicom", None)
    _failed(cli("ground", nifti, QUERY, "-b", finding_bundle), 3, "medreasoner[nifti]")
    output = tmp_path / "o.nii.gz"
    _failed(cli("ground", picture, QUERY, "-b", finding_bundle, "-o", output), 2, "medreasoner[nifti]")
    assert not output.exists()


# In a process of its own


def _program(*arguments, **options):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MEDREASONER")}
    code = "from medreasoner_cli.start import main; main()"
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], env=environment, **options)


def test_process_exits_with_the_code_and_prints_no_traceback(tmp_path):
    with _program("ground", tmp_path / "no.png", "x", "-b", "nope", stderr=subprocess.PIPE, text=True) as process:
        _, err = process.communicate(timeout=120)
    assert process.returncode == 4
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.skipif(os.name != "posix", reason="names that are no text")
@pytest.mark.parametrize("encoding", ["ascii", "utf-8:strict"])
@pytest.mark.parametrize("as_json", [False, True])
def test_file_names_that_the_output_cannot_hold_are_escaped(finding_bundle, picture, tmp_path, encoding, as_json):
    folder = tmp_path / "names"
    folder.mkdir()
    for name in (b"J\xc3\xb6rg.png", b"\xff\xfe.png", b"\x1b[31m.png"):
        Path(os.fsdecode(bytes(folder) + b"/" + name)).write_bytes(picture.read_bytes())
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    code = "from medreasoner_cli.start import main; main()"
    options = ["--json"] if as_json else []
    done = subprocess.run(
        [sys.executable, "-c", code, "ground", str(folder), QUERY, "-b", finding_bundle, *options],
        env=environment, capture_output=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.decode().splitlines()
    assert len(lines) == 3
    assert b"\x1b" not in done.stdout
    if as_json:
        names = {Path(json.loads(line)["image"]).name for line in lines}
        assert names == {"J\xf6rg.png", "\udcff\udcfe.png", "\x1b[31m.png"}


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_interrupt_while_the_program_is_imported_ends_it_quietly():
    code = (
        "import os, signal, sys\n"
        "class Interrupting:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'typer': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from medreasoner_cli.start import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code, "samples"], capture_output=True, check=False, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")


@pytest.mark.skipif(os.name != "posix", reason="signals of pipes")
def test_closed_pipe_ends_the_process_quietly(finding_bundle, folder):
    for index in range(4):
        (folder / f"x{index}.png").write_bytes((folder / "b.png").read_bytes())
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with _program("ground", folder, QUERY, "-b", finding_bundle, "--json", **pipes) as process:
        process.stdout.close()
        err = process.stderr.read().decode()
    assert "Traceback" not in err
    assert "BrokenPipe" not in err


def test_common_path_imports_nothing_that_it_does_not_need(picture, finding_bundle):
    code = (
        "import sys; from medreasoner_cli.main import run\n"
        f"assert run(['ground', {str(picture)!r}, 'Where?', '-b', {finding_bundle!r}]) == 0\n"
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    loaded = set(done.stdout.split())
    unwanted = {"rich", "torch", "transformers", "highdicom", "nibabel", "pydicom", "medreasoner_export"}
    assert not loaded & (unwanted | {"medreasoner_train", "medreasoner_cli.doctor", "medreasoner_cli.models"})


def test_help_and_version_do_not_import_the_runtime():
    for arguments in (["--help"], ["--version"], ["ground", "--help"]):
        code = f"import sys; from medreasoner_cli.main import run; run({arguments!r}); print(*sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
        loaded = set(done.stdout.splitlines()[-1].split())
        assert not loaded & {"numpy", "onnxruntime", "medreasoner", "rich"}, arguments


def test_samples_say_how_sure_an_answer_is(cli, picture, finding_bundle):
    done = cli("ground", picture, "Where?", "-b", finding_bundle, "--samples", "4")
    assert done.code == 0
    assert "samples  4 agree by " in done.out
    printed = cli("ground", picture, "Where?", "-b", finding_bundle, "--samples", "4", "--seed", "1", "--json")
    result = json.loads(printed.out)
    assert (result["samples"], result["confidence"]) == (4, None)
    assert 0 < result["concord"] <= 1
    assert json.loads(cli("ground", picture, "Where?", "-b", finding_bundle, "--json").out)["concord"] is None


def test_a_timeout_ends_an_answer_with_one_line(cli, picture, finding_bundle):
    done = cli("ground", picture, "Where?", "-b", finding_bundle, "--timeout", "0.000001")
    assert done.code == 4
    assert "not ready by its deadline" in done.err
    assert cli("ground", picture, "Where?", "-b", finding_bundle, "--timeout", "0").code == 2
    assert cli("ground", picture, "Where?", "-b", finding_bundle, "--timeout", "60").code == 0
