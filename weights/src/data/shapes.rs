use serde_json::{Value, json};

use super::{Example, Picture, Source};
use crate::Result;
use crate::world::{Caption, Category, Split, WorldExample, example, expressions};

/// Scenes of the shapes world.
#[derive(Clone, Debug)]
pub struct ShapesSource {
    /// Another seed, other scenes.
    pub seed: u64,
    /// Which captions; `None` those of both splits.
    pub split: Option<Split>,
    /// How many scenes.
    pub len: usize,
}

impl Source for ShapesSource {
    fn len(&self) -> usize {
        self.len
    }

    fn example(&self, index: usize) -> Result<Example> {
        let found = example(self.seed, index as u64, self.split);
        let split = self.split.map_or("both".to_owned(), |split| split.to_string());
        let name = |part: &str| format!("shapes {} {split} {index} {part}", self.seed);
        Ok(Example {
            expressions: expressions(&found.scene),
            caption: found.caption.to_string(),
            category: Some(tested(&found).into()),
            hard_captions: vec![found.other_caption.to_string()],
            hard_pictures: vec![Picture::Scene { name: name("other"), scene: found.other_scene }],
            picture: Picture::Scene { name: name("scene"), scene: found.scene },
        })
    }

    fn describe(&self) -> Value {
        json!({"shapes": {"seed": self.seed, "split": self.split.map(|split| split.to_string()), "examples": self.len}})
    }
}

/// What the hard negatives ask about: those of a relation have either other attributes or the reversed relation.
fn tested(example: &WorldExample) -> &'static str {
    match (&example.caption, &example.other_caption) {
        (Caption::Related(_, relation, _), Caption::Related(_, other, _)) if relation == other => Category::Binding,
        _ => example.caption.category(),
    }
    .name()
}
