//! `host-demo compare`: the columns are the pictures that `generate` draws, the numbers are those of its reports.

use std::path::Path;

use serde_json::{Value, json};
use tests::cli::{Picture, generated, host_demo};
use tests::committed;
use tests::dpt::scratch;

const PROMPTS: [&str; 2] = ["a red circle", "two green triangles"];

fn compared(folder: &Path, words: &[&str]) -> Value {
    let done = host_demo(folder, &[&["compare", "--json", "numbers.json"], words].concat());
    assert!(done.status.success(), "{words:?}: {}", String::from_utf8_lossy(&done.stderr));
    serde_json::from_slice(&std::fs::read(folder.join("numbers.json")).unwrap()).unwrap()
}

/// The picture in a cell, `side` pixels wide and shown `scale` times as large.
fn cell(figure: &Picture, (row, column): (usize, usize), side: usize, scale: usize) -> Vec<u8> {
    let (left, top) = (12 + column * (side * scale + 8), 12 + 24 + row * (24 + side * scale + 8) + 24);
    let pixel = |x: usize, y: usize| {
        let at = 3 * ((top + y * scale) * figure.size.0 as usize + left + x * scale);
        figure.pixels[at..at + 3].to_vec()
    };
    (0..side).flat_map(|y| (0..side).flat_map(move |x| pixel(x, y))).collect()
}

#[test]
fn columns_are_the_pictures_of_the_same_seeds() {
    let folder = scratch("compare_shapes");
    std::fs::write(folder.join("prompts.txt"), format!("{}\n\n  {}\r\n", PROMPTS[0], PROMPTS[1])).unwrap();
    let words = ["--prompts", "prompts.txt", "--seed", "5", "--seeds", "2", "--steps", "2", "--eta", "0.5,4"];
    let numbers = compared(&folder, &[&words[..], &["--batch", "3", "--out", "figure.png"]].concat());
    let figure = Picture::read(&folder.join("figure.png"));
    assert_eq!(figure.settings(), numbers["settings"]);
    let variants = numbers["variants"].as_array().unwrap();
    let labels: Vec<_> = variants.iter().map(|variant| variant["label"].as_str().unwrap()).collect();
    assert_eq!(labels, ["without plugin", "LoRA", "LoRA, eta 0.5", "LoRA, eta 4"]);

    // Row 2 is the second prompt's first seed.
    for (column, more) in [(0, &["--no-plugin"][..]), (3, &["--eta", "4", "--report", "report.json"])] {
        let words = ["--prompt", PROMPTS[1], "--seed", "5", "--steps", "2"];
        generated(&folder, &[&words[..], more].concat());
        let alone = Picture::read(&folder.join("out.png"));
        let found = cell(&figure, (2, column), 64, 2);
        // A batch adds numbers up in another order.
        let distance = found.iter().zip(&alone.pixels).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
        assert!(distance <= 2, "column {column}: {distance}");
    }
    assert_ne!(cell(&figure, (2, 1), 64, 2), cell(&figure, (2, 3), 64, 2));
    assert_ne!(cell(&figure, (2, 0), 64, 2), cell(&figure, (3, 0), 64, 2));

    let report: Value = serde_json::from_slice(&std::fs::read(folder.join("report.json")).unwrap()).unwrap();
    let row = &variants[3]["rows"][2];
    assert_eq!((&row["prompt"], &row["seed"]), (&json!(PROMPTS[1]), &json!(5)));
    for (step, score) in row["scores"].as_array().unwrap().iter().enumerate() {
        let expected = report["steps"][step]["items"][0]["score"].as_f64().unwrap();
        assert!((score.as_f64().unwrap() - expected).abs() < 1e-4);
    }
    for variant in variants {
        let rows = variant["rows"].as_array().unwrap();
        assert_eq!((rows.len(), &variant["steps"]), (4, &json!([0, 1])));
        let scores = rows.iter().map(|row| row["scores"][1].as_f64().unwrap());
        assert!((variant["mean_scores"][1].as_f64().unwrap() - scores.sum::<f64>() / 4.).abs() < 1e-6);
        let moved = rows.iter().all(|row| row["correction_norms"][0].as_f64().unwrap() > 0.);
        assert_eq!(moved, variant["eta"] != 0.);
    }
    // All start from the same latents, so their first scores are one, but for the LoRA.
    assert_eq!(variants[1]["rows"][1]["scores"][0], variants[3]["rows"][1]["scores"][0]);
    assert_ne!(variants[0]["rows"][1]["scores"][0], variants[1]["rows"][1]["scores"][0]);
}

/// An adapter that brings LoRA weights gets a column for them alone, and the first column is without them.
#[test]
fn the_plugins_lora_has_a_column_of_its_own() {
    let folder = scratch("compare_lora");
    let (model, adapter) = (committed("sd1-tiny"), committed("sd1-cases/release_mid.safetensors"));
    let config = json!({"adapter": adapter, "tap": "mid", "heads": 4, "matching_queries": 5}).to_string();
    let words = ["--prompt", "a", "--model", model.to_str().unwrap(), "--size", "64x64", "--steps", "2"];
    let compare = ["--config", &config, "--eta", "20", "--scheduler", "pndm"];
    let numbers = compared(&folder, &[&words[..], &compare].concat());
    let variants = numbers["variants"].as_array().unwrap();
    let labels: Vec<_> = variants.iter().map(|variant| variant["label"].as_str().unwrap()).collect();
    assert_eq!(labels, ["without plugin", "LoRA", "LoRA, eta 20"]);
    // The evaluation that PNDM adds is no step.
    assert!(variants.iter().all(|variant| variant["steps"] == json!([0, 1])));
    assert_eq!(numbers["settings"]["scheduler"], "pndm");
    let figure = Picture::read(&folder.join("compare.png"));
    generated(&folder, &[&words[..], &["--no-plugin", "--scheduler", "pndm"]].concat());
    let alone = Picture::read(&folder.join("out.png"));
    let [without, lora, corrected] = [0, 1, 2].map(|column| cell(&figure, (0, column), 64, 2));
    assert_eq!(without, alone.pixels);
    assert!(lora != without && corrected != lora);
}

#[test]
fn what_cannot_be_compared_is_said() {
    let folder = scratch("compare_refusals");
    std::fs::write(folder.join("empty.txt"), "\n \n").unwrap();
    for (code, words, expected) in [
        (2, &[][..], "--prompt"),
        (2, &["--prompt", "a", "--prompts", "empty.txt"], "cannot be used with"),
        (1, &["--prompts", "empty.txt"], "holds no prompts"),
        (1, &["--prompts", "absent.txt"], "absent.txt"),
        (2, &["--prompt", "a", "--seeds", "0"], "--seeds"),
        (2, &["--prompt", "a", "--batch", "0"], "--batch"),
        (1, &["--prompt", "a", "--eta=-1"], "between 0 and 100"),
        (1, &["--prompt", "a", "--out", "absent/c.png"], "no folder absent"),
    ] {
        let done = host_demo(&folder, &[&["compare", "--steps", "2"], words].concat());
        let message = String::from_utf8_lossy(&done.stderr).into_owned();
        assert!(done.status.code() == Some(code) && message.contains(expected), "{words:?}: {message}");
    }
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1);
}
