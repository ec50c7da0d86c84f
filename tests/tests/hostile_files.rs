//! Files that mean harm, at every door that takes weights: a clear error that names the file, in bounded memory and time.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use candle_core::{DType, Device};
use diffusion::lora::LoraFile;
use diffusion::text::TextEncoder;
use diffusion::{Pipeline, UNet, Vae};
use serde_json::json;
use tests::dpt::{create, host_config, scratch};
use tests::hosts::plain;
use tests::pickle::{call, checkpoint, dict, int, pickle, tensor, text, tuple, zip};
use tests::{committed, weights_program};

/// Opens a file, or says why not.
type Opener = Box<dyn Fn(&Path) -> Result<(), String>>;

/// A way for a file of weights into the project.
struct Door {
    name: &'static str,
    /// Where the file has to lie.
    file: PathBuf,
    open: Opener,
}

fn text_of<T, E: std::fmt::Display>(result: Result<T, E>) -> Result<(), String> {
    result.map(drop).map_err(|error| error.to_string())
}

fn program(words: &[&str], file: &Path, more: &[&str]) -> Result<(), String> {
    let done = Command::new(weights_program()).args(words).arg(file).args(more).output().unwrap();
    let message = String::from_utf8_lossy(&done.stderr).into_owned();
    match done.status.code() {
        Some(0) => Ok(()),
        Some(1) if message.starts_with("error: ") || message.contains("\nerror: ") => Err(message),
        other => panic!("{words:?} ended with {other:?}: {message}"),
    }
}

/// Every door, each with a folder of its own below that of the test.
fn doors(test: &str) -> Vec<Door> {
    let folder = scratch(test);
    let tiny = committed("sd1-tiny");
    for part in ["unet", "vae", "text_encoder"] {
        std::fs::create_dir_all(folder.join(part)).unwrap();
        std::fs::copy(tiny.join(part).join("config.json"), folder.join(part).join("config.json")).unwrap();
    }
    let door = |name, file: &str, open: Opener| Door { name, file: folder.join(file), open };
    let parent = |path: &Path| path.parent().unwrap().to_owned();
    let out = folder.join("converted.safetensors");
    vec![
        door(
            "U-Net",
            "unet/diffusion_pytorch_model.safetensors",
            Box::new(move |file| text_of(UNet::load(&parent(file), DType::F32, &Device::Cpu))),
        ),
        door(
            "autoencoder",
            "vae/diffusion_pytorch_model.safetensors",
            Box::new(move |file| text_of(Vae::load(&parent(file), DType::F32, &Device::Cpu))),
        ),
        door(
            "text encoder",
            "text_encoder/model.safetensors",
            Box::new(move |file| text_of(TextEncoder::load(&parent(file), DType::F32, &Device::Cpu))),
        ),
        door(
            "single file",
            "model.safetensors",
            Box::new(|file| text_of(Pipeline::load(file, DType::F32, &Device::Cpu))),
        ),
        door(
            "adapter",
            "adapter.safetensors",
            Box::new(|file| text_of(create(plain(), &host_config(json!({"adapter": file}))))),
        ),
        door("LoRA", "lora.safetensors", Box::new(|file| text_of(LoraFile::open(file, &Device::Cpu)))),
        door(
            "latents",
            "latents.safetensors",
            Box::new(|file| text_of(host_demo::latents_from_file(file, 4, &Device::Cpu))),
        ),
        door("inspect", "inspected.safetensors", Box::new(|file| program(&["inspect"], file, &["--json"]))),
        door(
            "convert",
            "input.safetensors",
            Box::new(move |file| program(&["convert"], file, &[out.to_str().unwrap(), "--to", "safetensors"])),
        ),
    ]
}

/// Every door refuses the bytes, naming the file and saying one of `words`.
#[track_caller]
fn refused_everywhere(test: &str, bytes: &[u8], words: &[&str]) {
    for door in doors(test) {
        std::fs::write(&door.file, bytes).unwrap();
        refused(&door, words);
    }
}

#[track_caller]
fn refused(door: &Door, words: &[&str]) {
    let started = Instant::now();
    let message = (door.open)(&door.file).expect_err(door.name);
    assert!(started.elapsed() < Duration::from_secs(60), "{}: {:?}", door.name, started.elapsed());
    assert!(message.contains(door.file.file_name().unwrap().to_str().unwrap()), "{}: {message}", door.name);
    assert!(words.iter().any(|word| message.contains(word)), "{}: {words:?} in {message}", door.name);
}

/// A safetensors file of this header and so many bytes behind it.
fn file(header: &str, data: usize) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![0; data]].concat()
}

fn entry(name: &str, dtype: &str, shape: &str, offsets: &str) -> String {
    format!(r#""{name}": {{"dtype": "{dtype}", "shape": {shape}, "data_offsets": {offsets}}}"#)
}

const NOT_READABLE: &[&str] = &["not a readable safetensors file"];

#[test]
fn truncated_files() {
    let whole = std::fs::read(committed("sd1-cases/lora_peft.safetensors")).unwrap();
    let header = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    for length in [0, 1, 3, 4, 7, 8, 9, 8 + header / 2, 8 + header, 9 + header, whole.len() - 1] {
        refused_everywhere("hostile_truncated", &whole[..length], NOT_READABLE);
    }
    // And one that goes on.
    refused_everywhere("hostile_longer", &[&whole[..], b"more"].concat(), NOT_READABLE);
    let pickle = std::fs::read(committed("sd1-cases/release_mid.bin")).unwrap();
    for length in [5, 100, pickle.len() / 2, pickle.len() - 1] {
        refused_everywhere("hostile_truncated_pickle", &pickle[..length], &["not a readable PyTorch pickle"]);
    }
}

#[test]
fn headers_longer_than_the_file() {
    for length in [u64::MAX, u64::MAX - 7, 1 << 40, 100_000_001, 99_999_999, 17] {
        let bytes = [&length.to_le_bytes()[..], b"{}"].concat();
        refused_everywhere("hostile_header_length", &bytes, NOT_READABLE);
    }
}

#[test]
fn headers_that_are_no_header() {
    let nested = "[".repeat(200_000);
    let nested_objects = r#"{"a":"#.repeat(100_000);
    for header in
        ["", "{", "null", "[]", "\u{feff}{}", r#"{"a": 1}"#, r#"{"a": {"dtype": "F32"}}"#, &nested, &nested_objects]
    {
        refused_everywhere("hostile_header", &file(header, 0), NOT_READABLE);
    }
    refused_everywhere("hostile_header_bytes", &[&8u64.to_le_bytes()[..], &[0xff; 8]].concat(), NOT_READABLE);
}

#[test]
fn offsets_that_overlap_leave_holes_or_overflow() {
    let two = |first: &str, second: &str| {
        format!("{{{}, {}}}", entry("latents", "F32", "[1]", first), entry("b", "F32", "[1]", second))
    };
    for header in [
        two("[0, 4]", "[0, 4]"),
        two("[0, 4]", "[2, 6]"),
        two("[0, 4]", "[8, 12]"),
        two("[4, 8]", "[0, 3]"),
        two("[0, 4]", "[4, 18446744073709551615]"),
        two("[18446744073709551612, 0]", "[0, 4]"),
        two("[0, -4]", "[0, 4]"),
        two("[4, 0]", "[4, 8]"),
        // The same name twice.
        format!("{{{}, {}}}", entry("a", "F32", "[1]", "[0, 4]"), entry("a", "F32", "[1]", "[4, 8]")),
    ] {
        refused_everywhere("hostile_offsets", &file(&header, 12), NOT_READABLE);
    }
}

#[test]
fn shapes_that_overflow() {
    for shape in
        ["[18446744073709551615, 2]", "[4294967296, 4294967296]", "[9223372036854775807]", "[-1]", "[1e3]", "[2]"]
    {
        let header = format!("{{{}}}", entry("latents", "F32", shape, "[0, 4]"));
        refused_everywhere("hostile_shapes", &file(&header, 4), NOT_READABLE);
    }
}

#[test]
fn types_that_are_no_numbers() {
    for dtype in ["F33", "", "f32", "STRING"] {
        let header = format!("{{{}}}", entry("latents", dtype, "[1]", "[0, 4]"));
        refused_everywhere("hostile_dtypes", &file(&header, 4), NOT_READABLE);
    }
    // Known types that weights do not come in: whoever looks at the numbers says so.
    for (dtype, size) in [("I64", 8), ("U8", 1), ("BOOL", 1), ("I16", 2)] {
        let shape = "[1, 4, 1, 1]";
        let offsets = format!("[0, {}]", 4 * size);
        let file_of = |name: &str, shape: &str| file(&format!("{{{}}}", entry(name, dtype, shape, &offsets)), 4 * size);
        let latents = doors("hostile_integers").remove(6);
        std::fs::write(&latents.file, file_of("latents", shape)).unwrap();
        refused(&latents, &["expected F32, F16, BF16 or F64", "unsupported"]);
        let adapter = doors("hostile_integers").remove(4);
        std::fs::write(&adapter.file, file_of("query_embed.weight", "[1, 4]")).unwrap();
        refused(&adapter, &["expected", "unsupported"]);
    }
}

/// One spoilt weight would spoil every picture: it is found by name, wherever it is.
#[test]
fn weights_that_are_not_finite() {
    for spoilt in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for (index, origin, name) in [
            (0, "sd1-tiny/unet/diffusion_pytorch_model.safetensors", "up_blocks.1.resnets.0.norm1.weight"),
            (1, "sd1-tiny/vae/diffusion_pytorch_model.safetensors", "decoder.conv_in.bias"),
            (2, "sd1-tiny/text_encoder/model.safetensors", "text_model.final_layer_norm.bias"),
            (4, "sd1-cases/release_mid.safetensors", "map_to_clip.2.bias"),
            (
                5,
                "sd1-cases/lora_kohya.safetensors",
                "lora_unet_up_blocks_3_attentions_0_transformer_blocks_0_attn1_to_out_0.alpha",
            ),
        ] {
            let door = doors("hostile_nan").remove(index);
            let mut tensors = candle_core::safetensors::load(committed(origin), &Device::Cpu).unwrap();
            let changed = tensors[name].flatten_all().unwrap();
            let mut values: Vec<f32> = changed.to_vec1().unwrap();
            *values.last_mut().unwrap() = spoilt;
            let changed = candle_core::Tensor::from_vec(values, tensors[name].shape(), &Device::Cpu).unwrap();
            tensors.insert(name.into(), changed);
            candle_core::safetensors::save(&tensors, &door.file).unwrap();
            refused(&door, &["holds NaN or infinity"]);
            assert!((door.open)(&door.file).unwrap_err().contains(name), "{name}");
        }
    }
}

/// A number that f16 cannot hold becomes infinity as it is loaded.
#[test]
fn weights_beyond_half_precision() {
    let folder = doors("hostile_half").remove(0).file.parent().unwrap().to_owned();
    let path = folder.join("diffusion_pytorch_model.safetensors");
    let mut tensors =
        candle_core::safetensors::load(committed("sd1-tiny/unet/diffusion_pytorch_model.safetensors"), &Device::Cpu)
            .unwrap();
    let bias = (&tensors["conv_in.bias"] * 1e6).unwrap();
    tensors.insert("conv_in.bias".into(), bias);
    candle_core::safetensors::save(&tensors, path).unwrap();
    UNet::load(&folder, DType::F32, &Device::Cpu).unwrap();
    let message = UNet::load(&folder, DType::F16, &Device::Cpu).err().unwrap().to_string();
    assert!(message.contains("`conv_in.bias` holds NaN or infinity as F16"), "{message}");
}

/// A state dict with one value.
fn state(value: Vec<u8>) -> Vec<u8> {
    checkpoint(&pickle(&dict(&[("query_embed.weight", value)])), &[0.5; 8])
}

#[test]
fn pickles_that_call_functions() {
    let folder = scratch("hostile_marker");
    let marker = folder.join("called");
    let touch = format!("touch '{}'", marker.display());
    for body in [
        call("os", "system", &[text(&touch)]),
        call("subprocess", "check_output", &[text(&touch)]),
        call("builtins", "exec", &[text("open('called', 'w')")]),
    ] {
        for bytes in [checkpoint(&pickle(&body), &[]), state(body.clone())] {
            refused_everywhere("hostile_calls", &bytes, &["not a readable PyTorch pickle"]);
        }
    }
    assert!(!marker.exists(), "nothing that a pickle names is called");
}

/// Twice as many objects with every line: `x = (x, x)`.
fn doubling(times: u8) -> Vec<u8> {
    let line = |id: u8| [b'q', id, b'h', id, 0x86];
    [&int(1)[..], &(0..times).flat_map(line).collect::<Vec<_>>()].concat()
}

#[test]
fn pickles_that_grow() {
    refused_everywhere("hostile_memo", &checkpoint(&pickle(&doubling(60)), &[]), &["would be copied", "nested"]);
    let deep = [&int(1)[..], &vec![0x85; 500_000]].concat();
    refused_everywhere("hostile_deep", &checkpoint(&pickle(&deep), &[]), &["nested more than"]);
    // A string that says it has four gigabytes.
    let long = [b"X", &u32::MAX.to_le_bytes()[..], b"short"].concat();
    refused_everywhere("hostile_string", &checkpoint(&pickle(&long), &[]), &["ends early"]);
    // Objects from nowhere, and opcodes that no file of tensors has.
    for (body, words) in [
        (b"R".to_vec(), "where there is none"),
        (b"h\x07".to_vec(), "nothing was remembered"),
        (b"t".to_vec(), "where there is none"),
        (b"\x93".to_vec(), "opcode 0x93"),
        (b"I1\n".to_vec(), "opcode 0x49"),
    ] {
        refused_everywhere("hostile_opcodes", &checkpoint(&pickle(&body), &[]), &[words]);
    }
    // The same objects remembered again and again.
    let wide = [&b"("[..], &int(1).repeat(20_000), b"t"].concat();
    let puts: Vec<u8> = (0..200u8).flat_map(|id| [b'q', id]).collect();
    refused_everywhere("hostile_puts", &checkpoint(&pickle(&[wide, puts].concat()), &[]), &["would be copied"]);
}

#[test]
fn tensors_larger_than_their_storage() {
    for (shape, stored) in [([1 << 20, 1 << 10], 1 << 30), ([i32::MAX, i32::MAX], i32::MAX), ([4, 4], 8)] {
        let value = tensor(&shape, &[shape[1], 1], 0, stored);
        refused_everywhere("hostile_storage", &state(value), &["not a readable PyTorch pickle"]);
    }
    let negative = state(tensor(&[-2, 4], &[4, 1], 0, 8));
    refused_everywhere("hostile_negative", &negative, &["not a readable PyTorch pickle"]);
    let arguments = state(call("torch._utils", "_rebuild_tensor_v2", &[tuple(&[])]));
    refused_everywhere("hostile_arguments", &arguments, &["not a readable PyTorch pickle"]);
}

#[test]
fn zip_archives_that_lie() {
    // No pickle at all, a compressed member, sizes that are not there.
    refused_everywhere("hostile_zip_empty", &zip(&[("archive/other", b"x")]), &["holds no tensors"]);
    let whole = state(tensor(&[2, 4], &[4, 1], 0, 8));
    let mut compressed = whole.clone();
    let directory = whole.windows(4).position(|bytes| bytes == b"PK\x01\x02").unwrap();
    (compressed[8], compressed[directory + 10]) = (8, 8);
    refused_everywhere("hostile_zip_deflate", &compressed, &["not a readable PyTorch pickle"]);
    let mut large = whole.clone();
    large[directory + 20..][..8].copy_from_slice(&[0xff, 0xff, 0xff, 0x7f, 0xff, 0xff, 0xff, 0x7f]);
    refused_everywhere("hostile_zip_sizes", &large, &["not a readable PyTorch pickle"]);
    // The format before 1.6.
    refused_everywhere("hostile_old", b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", &["before 1.6"]);
}

#[test]
fn what_is_no_file() {
    for door in doors("hostile_kinds") {
        std::fs::create_dir(&door.file).unwrap();
        // A folder is a model to some; none is in it.
        refused(&door, &["a folder", "no weights here", "model_index.json"]);
        std::fs::remove_dir(&door.file).unwrap();
        let absent = (door.open)(&door.file).expect_err(door.name);
        assert!(absent.contains("No such file") || absent.contains("no weights here"), "{}: {absent}", door.name);
    }
}

#[cfg(unix)]
#[test]
fn pipes_devices_and_loops() {
    for door in doors("hostile_pipes") {
        // A pipe that nobody writes to would be waited for.
        assert!(Command::new("mkfifo").arg(&door.file).status().unwrap().success());
        refused(&door, &["not a regular file", "no weights here", "model_index.json"]);
        std::fs::remove_file(&door.file).unwrap();
        std::os::unix::fs::symlink("/dev/zero", &door.file).unwrap();
        refused(&door, &["not a regular file", "no weights here", "model_index.json"]);
        std::fs::remove_file(&door.file).unwrap();
        std::os::unix::fs::symlink(&door.file, &door.file).unwrap();
        let message = (door.open)(&door.file).expect_err(door.name);
        assert!(message.contains("symbolic link") || message.contains("no weights here"), "{}: {message}", door.name);
        std::fs::remove_file(&door.file).unwrap();
    }
}

/// What would take gigabytes is refused by a process that may have half of one.
#[cfg(target_os = "linux")]
#[test]
fn memory_stays_bounded() {
    let folder = scratch("hostile_memory");
    let long = [b"X", &u32::MAX.to_le_bytes()[..], b"short"].concat();
    let strings = [&b"("[..], &long, b"t"].concat();
    for (name, bytes) in [
        ("header.safetensors", [&99_999_999u64.to_le_bytes()[..], b"{}"].concat()),
        ("shape.safetensors", file(&format!("{{{}}}", entry("a", "F32", "[1073741824]", "[0, 4294967296]")), 16)),
        ("memo.bin", checkpoint(&pickle(&doubling(40)), &[])),
        ("string.bin", checkpoint(&pickle(&strings), &[])),
        ("storage.bin", state(tensor(&[1 << 15, 1 << 15], &[1 << 15, 1], 0, 1 << 30))),
    ] {
        let path = folder.join(name);
        std::fs::File::create(&path).unwrap().write_all(&bytes).unwrap();
        let limited = format!("ulimit -v 512000; exec '{}' inspect '{}'", weights_program().display(), path.display());
        let done = Command::new("sh").args(["-c", &limited]).env("RAYON_NUM_THREADS", "1").output().unwrap();
        let message = String::from_utf8_lossy(&done.stderr).into_owned();
        assert!(done.status.code() == Some(1) && message.contains(name), "{name}: {:?} {message}", done.status);
    }
}
