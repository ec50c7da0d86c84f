//! A folder with pictures and `manifest.jsonl`: one JSON object on each line, with these keys:
//!
//! | key | |
//! |---|---|
//! | `image` | the picture's file, PNG or JPEG, relative to the folder; required |
//! | `caption` | what it shows; required |
//! | `category` | what its hard negatives test: matching is evaluated for each category also |
//! | `hard_captions` | list of captions that are nearly right |
//! | `hard_images` | list of files that nearly fit the caption |
//! | `expressions` | list of `{"text": .., "box": [x, y, width, height]}`, the box in the picture's pixels as COCO has it |

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Value, json};

use super::{Example, Picture, Source, picture};
use crate::world::Expression;
use crate::{Error, Result};

/// A folder that a user prepared.
#[derive(Debug)]
pub struct Manifest {
    folder: PathBuf,
    examples: Vec<Example>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    image: PathBuf,
    caption: String,
    category: Option<String>,
    #[serde(default)]
    hard_captions: Vec<String>,
    #[serde(default)]
    hard_images: Vec<PathBuf>,
    #[serde(default)]
    expressions: Vec<LineExpression>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LineExpression {
    text: String,
    #[serde(rename = "box")]
    bounding_box: [f64; 4],
}

impl Manifest {
    /// The manifest's name in its folder.
    pub const FILE: &'static str = "manifest.jsonl";

    /// Reads and checks the whole manifest; pictures are opened only for their size.
    pub fn open(folder: &Path) -> Result<Self> {
        let path = folder.join(Self::FILE);
        let text = std::fs::read_to_string(&path).map_err(|e| Error::file(&path, e))?;
        let mut examples = Vec::new();
        for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let failed = |message: String| Error::file(&path, format!("line {}: {message}", index + 1));
            let line: Line = serde_json::from_str(line).map_err(|e| failed(e.to_string()))?;
            examples.push(example(folder, line).map_err(|e| failed(e.to_string()))?);
        }
        if examples.is_empty() {
            return Err(Error::file(&path, "holds no examples"));
        }
        Ok(Self { folder: folder.to_owned(), examples })
    }
}

impl Source for Manifest {
    fn len(&self) -> usize {
        self.examples.len()
    }

    fn example(&self, index: usize) -> Result<Example> {
        Ok(self.examples[index].clone())
    }

    fn describe(&self) -> Value {
        json!({"manifest": {"folder": self.folder, "examples": self.examples.len()}})
    }
}

fn example(folder: &Path, line: Line) -> Result<Example> {
    let some = |what: &str, text: &str| {
        if text.trim().is_empty() { Err(Error::Request(format!("{what} is empty"))) } else { Ok(()) }
    };
    some("`caption`", &line.caption)?;
    line.category.iter().try_for_each(|text| some("`category`", text))?;
    line.hard_captions.iter().try_for_each(|text| some("a text of `hard_captions`", text))?;
    if let Some(same) = line.hard_captions.iter().find(|text| **text == line.caption) {
        return Err(Error::Request(format!("`hard_captions` has the caption itself: \"{same}\"")));
    }
    let image = folder.join(&line.image);
    let (width, height) = picture::size(&image)?;
    let hard_images: Vec<PathBuf> = line.hard_images.iter().map(|file| folder.join(file)).collect();
    hard_images.iter().try_for_each(|file| picture::size(file).map(|_| ()))?;
    if hard_images.contains(&image) {
        return Err(Error::Request(format!("`hard_images` has the picture itself: {}", line.image.display())));
    }
    let expression = |e: LineExpression| {
        some("an expression's `text`", &e.text)?;
        let [x, y, w, h] = e.bounding_box;
        let (right, bottom) = (f64::from(width), f64::from(height));
        // Annotations may reach a pixel over the border.
        let inside = x >= -1. && y >= -1. && w > 0. && h > 0. && x + w <= right + 1. && y + h <= bottom + 1.;
        if !inside {
            let message =
                format!("the box {:?} of \"{}\" is not in the picture of {width}x{height}", e.bounding_box, e.text);
            return Err(Error::Request(message));
        }
        let (x0, y0, x1, y1) = (x.max(0.), y.max(0.), (x + w).min(right), (y + h).min(bottom));
        let centre = [(x0 + x1) / 2. / right, (y0 + y1) / 2. / bottom];
        let size = [(x1 - x0) / right, (y1 - y0) / bottom];
        let bounding_box = [centre[0], centre[1], size[0], size[1]].map(|v| v as f32);
        Ok(Expression { text: e.text, bounding_box })
    };
    Ok(Example {
        picture: Picture::File(image),
        caption: line.caption,
        category: line.category,
        hard_captions: line.hard_captions,
        hard_pictures: hard_images.into_iter().map(Picture::File).collect(),
        expressions: line.expressions.into_iter().map(expression).collect::<Result<_>>()?,
    })
}
