//! The tokenizer against transformers' CLIPTokenizer: CLIP's real vocabulary, the tiny pipelines, the shapes model.

use std::path::Path;

use candle_core::DType;
use diffusion::text::Tokenizer;
use tests::{FAMILIES, case, parity};

fn json<T: serde::de::DeserializeOwned>(path: &str) -> T {
    let path = parity(path);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

#[test]
fn parity_with_clips_own_vocabulary() {
    let from_files = Tokenizer::load(&parity("clip-tokenizer"), 77).unwrap();
    // For models that bring none.
    let shipped = Tokenizer::clip("<|endoftext|>", 77).unwrap();
    let cases: Vec<serde_json::Value> = json("clip-tokenizer/cases.json");
    assert!(!cases.is_empty());
    for case in cases {
        let prompt = case["prompt"].as_str().unwrap();
        let expected: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
        for tokenizer in [&from_files, &shipped] {
            assert_eq!(tokenizer.encode(prompt).unwrap().ids, expected, "{prompt:?}");
        }
    }
}

#[test]
fn parity_of_both_pipelines() {
    for family in FAMILIES {
        let tokenizer = Tokenizer::load(&parity(&format!("{family}-tiny/tokenizer")), 77).unwrap();
        let prompts: Vec<String> = json(&format!("{family}-cases/text.json"));
        let ids = case(&format!("{family}-cases/text.safetensors"))["ids"].to_dtype(DType::U32).unwrap();
        let ids: Vec<Vec<u32>> = ids.to_vec2().unwrap();
        assert_eq!(prompts.len(), ids.len());
        for (prompt, expected) in prompts.iter().zip(&ids) {
            assert_eq!(&tokenizer.encode(prompt).unwrap().ids, expected, "{family}: {prompt:?}");
        }
    }
}

#[test]
fn parity_says_what_was_cut() {
    let tokenizer = Tokenizer::load(&parity("clip-tokenizer"), 77).unwrap();
    let word = "word ";
    for (count, dropped) in [(1, 0), (75, 0), (76, 1), (120, 45)] {
        let tokens = tokenizer.encode(&word.repeat(count)).unwrap();
        assert_eq!((tokens.ids.len(), tokens.dropped), (77, dropped), "{count} words");
        assert_eq!(tokens.ids.last(), Some(&49407), "the end token is never cut");
    }
}

#[test]
fn parity_of_the_shapes_vocabulary() {
    // Whole words, 16 ids, a padding token of its own; the ids are those of its vocab.json.
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../weights/shapes/tokenizer");
    let tokenizer = Tokenizer::load(&folder, 16).unwrap();
    let vocab: std::collections::HashMap<String, u32> =
        serde_json::from_str(&std::fs::read_to_string(folder.join("vocab.json")).unwrap()).unwrap();
    let words = ["a", "red", "circle", "to", "the", "left", "of", "two", "orange", "squares"];
    let mut expected = vec![vocab["<|startoftext|>"]];
    expected.extend(words.map(|word| vocab[&format!("{word}</w>")]));
    expected.push(vocab["<|endoftext|>"]);
    expected.resize(16, vocab["<|pad|>"]);
    assert_eq!(tokenizer.encode("A red circle to the left of two orange squares").unwrap().ids, expected);
}
