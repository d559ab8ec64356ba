import json
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from medreasoner_cli.checks import _GRAPH
from medreasoner_cli.failures import exit_code


def test_version_is_that_of_the_distribution(cli):
    done = cli("--version")
    assert (done.code, done.out) == (0, f"medreasoner {version('medreasoner')}\n")


@pytest.mark.parametrize(
    "arguments",
    [[], *([name] for name in ["ground", "samples", "doctor", "bench", "eval", "models", "export", "train"])],
    ids=lambda arguments: " ".join(arguments) or "program",
)
def test_help_names_every_option(cli, arguments):
    done = cli(*arguments, "--help")
    assert done.code == 0
    assert done.out.startswith(f"Usage: {' '.join(['medreasoner-cli', *arguments])}")
    assert "\\b" not in done.out


def test_nothing_at_all_prints_the_help_and_is_wrong_usage(cli):
    done = cli()
    assert done.code == 2
    assert "Commands:" in done.err


def test_every_error_of_the_package_has_its_code():
    from medreasoner import errors

    codes = {name: exit_code(getattr(errors, name)("x")) for name in errors.__all__}
    assert codes == {
        "ArrayError": 4,
        "BundleError": 4,
        "CancelledError": 4,
        "CodecError": 3,
        "DeadlineError": 4,
        "GenerationError": 4,
        "ImageReadError": 3,
        "MedReasonerError": 4,
        "MissingExtraError": 4,
        "OutputError": 2,
        "ProviderError": 4,
        "QueryError": 2,
        "QueueFullError": 4,
    }


# samples


def test_samples_are_listed_with_their_queries(cli):
    from medreasoner.samples import SAMPLES

    done = cli("samples")
    assert done.code == 0
    for sample in SAMPLES.values():
        assert f"sample:{sample.name}" in done.out
        assert repr(sample.query) in done.out


def test_samples_without_the_package_say_how_to_get_it(cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "data_store", None)
    done = cli("samples")
    assert done.code == 0
    assert "sample:chest" in done.out
    assert "pip install 'medreasoner[samples]'" in done.out


# models


def test_models_list_shows_the_folder_of_bundles(cli, finding_bundle, monkeypatch):
    monkeypatch.setenv("MEDREASONER_BUNDLES", str(Path(finding_bundle).parent))
    done = cli("models", "list", "--json")
    assert json.loads(done.out)["finding"] == finding_bundle
    assert "finding" in cli("models", "list").out


def test_models_info_tells_licence_training_and_quality(cli, finding_bundle):
    done = cli("models", "info", finding_bundle)
    assert done.code == 0
    for text in ("toy 0.1.0", "public domain", "random weights, for tests only", "data: none", "lungs: 0.500"):
        assert text in done.out
    as_json = json.loads(cli("models", "info", finding_bundle, "--json").out)
    assert as_json == json.loads((Path(finding_bundle) / "manifest.json").read_text())


def test_models_verify_hashes_everything(cli, finding_bundle, tmp_path):
    assert cli("models", "verify", finding_bundle).code == 0
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(finding_bundle, copy)
    (copy / "extra.bin").write_bytes(b"x")
    done = cli("models", "verify", copy)
    assert done.code == 4
    assert "extra.bin" in done.err


def test_export_verify_writes_its_report_where_it_is_wanted(cli, toy_folder, tmp_path):
    checkpoints = ("--reasoner", toy_folder / "reasoner", "--segmenter", toy_folder / "segmenter")
    done = cli("export", "verify", toy_folder / "bundle", *checkpoints, "-o", tmp_path / "report.json")
    assert done.code == 0
    assert "whole answers: logits" in done.out
    assert "compared: image embedding" in done.err
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["passed"]
    assert any(stage["name"].startswith("whole answers") for stage in report["stages"])
    done = cli("export", "verify", toy_folder / "bundle", *checkpoints, "--image", "a.png")
    assert done.code == 2
    assert "give one for each" in done.err


@pytest.mark.parametrize("command", ["info", "verify"])
def test_models_of_a_bundle_that_is_not_there_is_code_4(cli, command):
    done = cli("models", command, "nowhere")
    assert done.code == 4
    assert done.err.startswith("error: ")


# doctor


def test_doctor_finds_a_working_machine(cli, finding_bundle):
    done = cli("doctor", "-b", finding_bundle, "--json")
    findings = json.loads(done.out)
    assert done.code == 0
    by_name = {finding["name"]: finding for finding in findings}
    assert by_name["bundle"]["state"] == "ok"
    assert any(finding["detail"] == "cpu works" for finding in findings)
    assert {"python", "packages", "runtime", "device", "processor", "codec"} <= by_name.keys()


def test_doctor_says_what_a_gpu_would_take(cli, finding_bundle):
    findings = json.loads(cli("doctor", "-b", finding_bundle, "--json").out)
    (finding,) = (each for each in findings if "NVIDIA GPU" in each["detail"])
    assert finding["state"] == "note"
    assert "medreasoner[gpu]" in finding["advice"]


def test_doctor_in_words_has_a_line_for_each_finding(cli, finding_bundle):
    done = cli("doctor", "-b", finding_bundle)
    assert done.out.count("\n") >= 15
    assert "FAULT" not in done.out


def test_doctor_with_a_bad_bundle_is_code_4_and_says_what_to_do(cli):
    done = cli("doctor", "-b", "nowhere")
    assert done.code == 4
    assert "FAULT   bundle" in done.out
    assert "-> " in done.out


@pytest.mark.parametrize(
    ("installed", "advice"),
    [
        pytest.param((), "pip install 'medreasoner[cpu]'", id="no runtime"),
        pytest.param(("onnxruntime", "onnxruntime-gpu"), "pip uninstall", id="two runtimes"),
    ],
)
def test_doctor_with_no_or_two_runtimes_is_code_4(cli, finding_bundle, monkeypatch, installed, advice):
    import medreasoner.providers

    monkeypatch.setattr(medreasoner.providers, "_is_installed", lambda name: name in installed)
    done = cli("doctor", "-b", finding_bundle, "--json")
    (runtime,) = [finding for finding in json.loads(done.out) if finding["name"] == "runtime"]
    assert (done.code, runtime["state"]) == (4, "FAULT")
    assert advice in runtime["detail"] + runtime["advice"]


def test_doctor_tries_the_runtime_that_is_listed_as_installed(cli, finding_bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # an import of it fails now
    done = cli("doctor", "-b", finding_bundle, "--json")
    (runtime,) = [finding for finding in json.loads(done.out) if finding["name"] == "runtime"]
    assert (done.code, runtime["state"]) == (4, "FAULT")
    assert "pip install --force-reinstall onnxruntime" in runtime["advice"]


def test_graph_that_devices_compute_is_a_valid_model():
    onnx = pytest.importorskip("onnx")
    model = onnx.load_model_from_string(_GRAPH)
    onnx.checker.check_model(model)
    assert [node.op_type for node in model.graph.node] == ["Add"]


# bench


def test_bench_reports_percentiles_of_each_stage(cli, picture, finding_bundle):
    done = cli("bench", picture, "Where?", "-b", finding_bundle, "-n", "3", "--anyway", "--json")
    assert done.code == 0
    report = json.loads(done.out)
    assert report["runs"] == 3
    assert report["bundle"]["name"] == "toy"
    assert len(report["providers"]) == 4
    assert set(report["providers"].values()) == {"CPUExecutionProvider"}
    for part in ("first", "further"):
        assert all(0 <= stage["p50"] <= stage["p95"] for stage in report[part].values())
        assert "wall" in report[part]
    assert "vision" in report["first"]
    assert "vision" not in report["further"]


def test_bench_prints_a_table(cli, picture, finding_bundle):
    done = cli("bench", picture, "Where?", "-b", finding_bundle, "-n", "1", "--anyway")
    assert " on CPUExecutionProvider, " in done.out.splitlines()[0]
    table = [line for line in done.out.splitlines() if not line.startswith("note: ")]
    assert table[1].split() == ["ms", "first", "p50", "p95", "further", "p50", "p95"]


# export, train


def test_export_makes_a_bundle_that_answers(cli, toy_folder, picture, tmp_path):
    for kind in ("reasoner", "segmenter"):
        assert cli("export", kind, toy_folder / kind, "-o", tmp_path / kind).code == 0
    parts = (tmp_path / "reasoner", tmp_path / "segmenter")
    done = cli("export", "bundle", *parts, "-o", tmp_path / "out", "--name", "mine", "--licence", "CC0")
    assert (done.code, done.out.strip()) == (0, str(tmp_path / "out"))
    assert "mine 0.1.0" in cli("models", "info", tmp_path / "out").out
    assert cli("ground", picture, "Where?", "-b", tmp_path / "out").code in (0, 1)


def test_export_of_something_else_is_one_line_and_code_4(cli, tmp_path):
    done = cli("export", "reasoner", tmp_path, "-o", tmp_path / "out")
    assert done.code == 4
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1


def test_export_settings_must_be_a_json_object(cli, toy_folder, tmp_path):
    (tmp_path / "s.json").write_text("[]")
    done = cli("export", "reasoner", toy_folder / "reasoner", "-o", tmp_path / "o", "--settings", tmp_path / "s.json")
    assert done.code == 2
    assert "JSON object" in done.err


@pytest.mark.parametrize(
    ("arguments", "module", "extra"),
    [
        (["export", "reasoner", "x", "-o", "y"], "medreasoner_export", "export"),
        (["train", "sft", "--data", "x", "-o", "y", "--steps", "1"], "medreasoner_train.sft", "train"),
        (["eval", "--data", "x"], "medreasoner_train.evaluate", "train"),
    ],
    ids=["export", "train", "eval"],
)
def test_missing_packages_are_named_with_the_extra(cli, monkeypatch, finding_bundle, arguments, module, extra):
    import importlib

    real = importlib.import_module

    def without_torch(name, package=None):
        if name == module:
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", without_torch)
    monkeypatch.setenv("MEDREASONER_BUNDLE", finding_bundle)
    done = cli(*arguments)
    assert done.code == 4
    assert done.err.splitlines()[-1] == f"error: this needs the package 'torch': pip install 'medreasoner[{extra}]'"
