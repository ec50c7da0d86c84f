//! The reference host's program as a user runs it, and the pictures that it writes.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

use crate::host_program;

/// Runs `host-demo generate` with these words in `folder`.
pub fn generate(folder: &Path, words: &[&str]) -> Output {
    host_demo(folder, &[&["generate"], words].concat())
}

/// Runs `host-demo` with these words in `folder`.
pub fn host_demo(folder: &Path, words: &[&str]) -> Output {
    let mut command = Command::new(host_program());
    command.current_dir(folder).args(words).env("RAYON_NUM_THREADS", "2");
    // What the user's shell may say of logs is not for tests.
    command.env_remove("RUST_LOG").output().unwrap()
}

/// The same, which has to succeed.
#[track_caller]
pub fn generated(folder: &Path, words: &[&str]) {
    let done = generate(folder, words);
    assert!(done.status.success(), "{words:?}: {}", String::from_utf8_lossy(&done.stderr));
}

/// A picture in 8-bit RGB and its text entries.
pub struct Picture {
    /// Width and height.
    pub size: (u32, u32),
    /// Rows of RGB.
    pub pixels: Vec<u8>,
    /// Keyword and text.
    pub texts: Vec<(String, String)>,
}

impl Picture {
    /// Reads a PNG.
    pub fn read(path: &Path) -> Self {
        let file = std::fs::File::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let mut reader = png::Decoder::new(std::io::BufReader::new(file)).read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        let frame = reader.next_frame(&mut pixels).unwrap();
        assert_eq!((frame.color_type, frame.bit_depth), (png::ColorType::Rgb, png::BitDepth::Eight));
        pixels.truncate(frame.buffer_size());
        let texts = &reader.info().utf8_text;
        let texts = texts.iter().map(|chunk| (chunk.keyword.clone(), chunk.get_text().unwrap())).collect();
        Self { size: (frame.width, frame.height), pixels, texts }
    }

    /// The text entry of that keyword.
    pub fn text(&self, keyword: &str) -> &str {
        let found = self.texts.iter().find(|(key, _)| key == keyword);
        &found.unwrap_or_else(|| panic!("no text {keyword}")).1
    }

    /// The settings that made it.
    pub fn settings(&self) -> Value {
        serde_json::from_str(self.text("host-demo")).unwrap()
    }

    /// The largest difference between two pixels' values at the same place.
    #[track_caller]
    pub fn distance(&self, other: &Self) -> u8 {
        assert_eq!(self.size, other.size);
        self.pixels.iter().zip(&other.pixels).map(|(a, b)| a.abs_diff(*b)).max().unwrap()
    }
}
