use super::{Object, Relation, Scene};

/// Words for one object of a scene, which fit no other.
#[derive(Clone, Debug, PartialEq)]
pub struct Expression {
    /// "the red circle", "the left square", "the red circle above the blue square".
    pub text: String,
    /// (cx, cy, w, h) in shares of the picture.
    pub bounding_box: [f32; 4],
}

/// Every expression for an object of the scene. Only words that the captions use too: the text encoder knows no others.
pub fn expressions(scene: &Scene) -> Vec<Expression> {
    let mut found = Vec::new();
    for (index, object) in scene.objects.iter().enumerate() {
        let others: Vec<&Object> =
            scene.objects.iter().enumerate().filter(|(i, _)| *i != index).map(|(_, o)| o).collect();
        let mut add = |text: String| found.push(Expression { text, bounding_box: object.bounding_box() });
        let (colour, shape) = (object.kind.colour.name(), object.kind.shape.name());
        if others.iter().all(|o| o.kind != object.kind) {
            add(format!("the {colour} {shape}"));
        }
        if others.iter().all(|o| o.kind.shape != object.kind.shape) {
            add(format!("the {shape}"));
        }
        let centre = |o: &Object| (o.x, o.y);
        // Among its like, the one that is clearly at an end.
        let like: Vec<_> = others.iter().filter(|o| o.kind == object.kind).collect();
        for (word, relation) in [("left", Relation::Left), ("right", Relation::Right)] {
            let further = |o: &&&Object| match relation {
                Relation::Left => object.x + Relation::CLEAR < o.x,
                _ => object.x > o.x + Relation::CLEAR,
            };
            if !like.is_empty() && like.iter().all(further) {
                add(format!("the {word} {colour} {shape}"));
                add(format!("the {word} {shape}"));
            }
        }
        if let [other] = others[..]
            && other.kind != object.kind
        {
            for relation in Relation::ALL.into_iter().filter(|r| r.holds(centre(object), centre(other))) {
                let name = |o: &Object| format!("the {} {}", o.kind.colour.name(), o.kind.shape.name());
                add(format!("{} {} {}", name(object), relation.words(), name(other)));
            }
        }
    }
    found
}
