//! What is trained on and evaluated: pictures with captions, hard negatives of both, and referring expressions with boxes.
//!
//! [`Source`] is where examples come from: the shapes world ([`ShapesSource`]) or a folder that a user prepared
//! ([`Manifest`]). [`Encoder`] turns their pictures into latents and their texts into embeddings, and remembers both.

mod encoder;
mod manifest;
mod picture;
mod shapes;

pub use encoder::{Encoder, TextBatch};
pub use manifest::Manifest;
pub use picture::{Picture, read as read_picture};
pub use shapes::ShapesSource;

use serde_json::Value;

use crate::Result;
use crate::world::Expression;

/// A picture and what is said of it.
#[derive(Clone, Debug)]
pub struct Example {
    /// The picture.
    pub picture: Picture,
    /// What it shows.
    pub caption: String,
    /// What its hard negatives test, where that is known: results are given for each category.
    pub category: Option<String>,
    /// Captions that are nearly right.
    pub hard_captions: Vec<String>,
    /// Pictures that nearly fit the caption.
    pub hard_pictures: Vec<Picture>,
    /// Words for its objects.
    pub expressions: Vec<Expression>,
}

/// A row of examples, the same at every reading.
pub trait Source {
    /// How many there are; at least one.
    fn len(&self) -> usize;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// One of them.
    fn example(&self, index: usize) -> Result<Example>;

    /// What it is, for the metadata of what is trained on it.
    fn describe(&self) -> Value;
}
