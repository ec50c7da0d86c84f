//! CLIP's own vocabulary, for models that bring no tokenizer.
//!
//! `clip_merges.txt` is the list of merges of OpenAI's CLIP, as the open_clip_torch package ships it (MIT licence). The 49 408
//! tokens follow from it: the byte alphabet, the same at the end of a word, what each merge makes, and two special tokens.

use std::collections::HashMap;

const MERGES: &str = include_str!("clip_merges.txt");

/// The tokens that CLIP marks a prompt's ends with.
pub(super) const START: &str = "<|startoftext|>";
pub(super) const END: &str = "<|endoftext|>";

/// Pairs of tokens that are merged, most frequent first.
pub(super) fn merges() -> Vec<(String, String)> {
    let pairs = MERGES.lines().skip(1).filter_map(|line| line.split_once(' '));
    pairs.map(|(left, right)| (left.to_owned(), right.to_owned())).collect()
}

/// Every token with its id.
pub(super) fn vocabulary(merges: &[(String, String)]) -> HashMap<String, u32> {
    let letters = || byte_alphabet().into_iter();
    let ends = letters().map(|letter| format!("{letter}</w>"));
    let merged = merges.iter().map(|(left, right)| format!("{left}{right}"));
    let special = [START, END].map(str::to_owned);
    let tokens = letters().map(String::from).chain(ends).chain(merged).chain(special);
    tokens.zip(0..).collect()
}

/// The letters that stand for the 256 bytes: printable ones for themselves, then others in their order.
fn byte_alphabet() -> Vec<char> {
    let printable = (33..=126).chain(161..=172).chain(174..=255).filter_map(char::from_u32);
    let mut letters: Vec<char> = printable.collect();
    letters.extend((256..).filter_map(char::from_u32).take(256 - letters.len()));
    letters
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_vocabulary_is_clips() {
        let merges = merges();
        let vocabulary = vocabulary(&merges);
        assert_eq!((merges.len(), vocabulary.len()), (48_894, 49_408));
        assert_eq!((vocabulary["!"], vocabulary[START], vocabulary[END]), (0, 49_406, 49_407));
        // The list that transformers keeps.
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/parity/clip-tokenizer/vocab.json");
        let expected: HashMap<String, u32> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        assert!(vocabulary == expected);
    }
}
