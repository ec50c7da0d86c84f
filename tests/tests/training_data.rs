//! A user's training data: what is understood, and that errors name file and line.

use std::path::PathBuf;

use candle_core::{DType, Device};
use diffusion::Pipeline;
use host_demo::Rgb;
use weights::data::{Encoder, Manifest, Picture, Source};

fn folder(name: &str, lines: &[&str]) -> PathBuf {
    let folder = std::env::temp_dir().join(format!("training-data-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    Rgb::filled(40, 20, [200, 0, 0]).unwrap().save_png(&folder.join("a.png"), &[]).unwrap();
    Rgb::filled(64, 64, [0, 0, 200]).unwrap().save_png(&folder.join("b.png"), &[]).unwrap();
    std::fs::write(folder.join("text.png"), "not a picture").unwrap();
    std::fs::write(folder.join("manifest.jsonl"), lines.join("\n")).unwrap();
    folder
}

#[test]
fn a_manifest_is_read() {
    let line =
        r#"{"image": "a.png", "caption": "a red wall", "hard_captions": ["a blue wall"], "hard_images": ["b.png"],
        "expressions": [{"text": "the wall", "box": [10, 5, 20, 10]}]}"#
            .replace('\n', " ");
    let folder = folder("read", &[&line, "", r#"{"image": "b.png", "caption": "a blue wall"}"#]);
    let manifest = Manifest::open(&folder).unwrap();
    assert_eq!(manifest.len(), 2);
    let example = manifest.example(0).unwrap();
    assert_eq!((example.caption.as_str(), &example.hard_captions[..]), ("a red wall", &["a blue wall".to_owned()][..]));
    // Pixels become shares of the picture: 40 wide, 20 high.
    assert_eq!(example.expressions[0].bounding_box, [0.5, 0.5, 0.5, 0.5]);
    assert_eq!(example.picture.pixels(8, 8).unwrap(), Rgb::filled(8, 8, [200, 0, 0]).unwrap());
    assert!(manifest.example(1).unwrap().expressions.is_empty());
}

#[test]
fn errors_name_the_line_and_what_is_wrong_there() {
    let good = r#"{"image": "a.png", "caption": "a red wall"}"#;
    let cases = [
        ("", "no examples"),
        ("{", "line 1"),
        (r#"{"image": "a.png"}"#, "caption"),
        (r#"{"image": "a.png", "caption": " "}"#, "`caption` is empty"),
        (r#"{"image": "a.png", "caption": "x", "captions": []}"#, "captions"),
        (r#"{"image": "c.png", "caption": "x"}"#, "c.png"),
        (r#"{"image": "text.png", "caption": "x"}"#, "not a readable PNG or JPEG"),
        (r#"{"image": "a.png", "caption": "x", "hard_captions": ["x"]}"#, "the caption itself"),
        (r#"{"image": "a.png", "caption": "x", "hard_images": ["c.png"]}"#, "c.png"),
        (r#"{"image": "a.png", "caption": "x", "expressions": [{"text": "y", "box": [0, 0, 50, 5]}]}"#, "40x20"),
        (r#"{"image": "a.png", "caption": "x", "expressions": [{"text": "y", "box": [0, 0, 0, 5]}]}"#, "box"),
        (r#"{"image": "a.png", "caption": "x", "expressions": [{"text": "", "box": [0, 0, 5, 5]}]}"#, "is empty"),
    ];
    for (index, (line, expected)) in cases.into_iter().enumerate() {
        let message = Manifest::open(&folder(&format!("wrong{index}"), &[line])).unwrap_err().to_string();
        assert!(message.contains("manifest.jsonl") && message.contains(expected), "{line}: {message}");
        if !line.is_empty() {
            let second = Manifest::open(&folder(&format!("second{index}"), &[good, line])).unwrap_err().to_string();
            assert!(second.contains("line 2"), "{line}: {second}");
        }
    }
    let message = Manifest::open(std::path::Path::new("/nowhere")).unwrap_err().to_string();
    assert!(message.contains("/nowhere/manifest.jsonl"), "{message}");
}

/// Latents come from the folder of an earlier run when the picture is the same, and not when it was changed.
#[test]
fn latents_are_remembered_on_disk() {
    let folder = folder("cache", &[]);
    let cache = folder.join("latents");
    let model = host_demo::default_model().unwrap();
    let encoder = || {
        let Pipeline { text, vae, .. } = Pipeline::load(&model, DType::F32, &Device::Cpu).unwrap();
        Encoder::new(text, vae, (64, 64), &Device::Cpu, Some(cache.clone())).unwrap()
    };
    let (red, blue) = (Picture::File(folder.join("a.png")), Picture::File(folder.join("b.png")));
    let files = || std::fs::read_dir(&cache).unwrap().count();
    let first = encoder().latents(&[&red, &blue, &red]).unwrap();
    assert_eq!((first.dims(), files()), (&[3, 4, 16, 16][..], 2));
    let again = encoder().latents(&[&red, &blue, &red]).unwrap();
    assert_eq!((tests::bits(&first), files()), (tests::bits(&again), 2));
    Rgb::filled(41, 20, [0, 200, 0]).unwrap().save_png(&folder.join("a.png"), &[]).unwrap();
    let changed = encoder().latents(&[&red]).unwrap();
    assert_ne!(tests::bits(&changed), tests::bits(&first.narrow(0, 0, 1).unwrap()));
    assert_eq!(files(), 3);
}
