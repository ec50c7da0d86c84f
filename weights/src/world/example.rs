use super::{Caption, Colour, Kind, Object, Random, Relation, SIDE, Scene, Shape, Split};

/// A scene and its caption, with a hard negative of each.
#[derive(Clone, Debug)]
pub struct WorldExample {
    /// What the scene shows.
    pub caption: Caption,
    /// Shows it.
    pub scene: Scene,
    /// Nearly the same caption, which the scene does not fit.
    pub other_caption: Caption,
    /// Nearly the same scene, which fits that caption alone.
    pub other_scene: Scene,
}

/// The `index`-th example of a split, or of both in the proportion that they have.
pub fn example(seed: u64, index: u64, split: Option<Split>) -> WorldExample {
    let mut random = Random::new(seed, index);
    loop {
        let caption = sample_caption(&mut random);
        if split.is_some_and(|split| Split::of(&caption) != split) {
            continue;
        }
        // A scene has no room for some negatives (a third object), and some captions none in their split.
        for _ in 0..ATTEMPTS {
            let scene = sample_scene(&caption, &mut random);
            let (other_caption, other_scene) = match hard_negative(&caption, &scene, &mut random) {
                Some(negative) => negative,
                None => continue,
            };
            return WorldExample { caption, scene, other_caption, other_scene };
        }
    }
}

const ATTEMPTS: usize = 50;

/// In the proportions that the base model was trained on.
pub fn sample_caption(random: &mut Random) -> Caption {
    let kind = |random: &mut Random| Kind { colour: *random.choose(&Colour::ALL), shape: *random.choose(&Shape::ALL) };
    let a = kind(random);
    // Two objects differ in colour and in shape: their attributes can then be swapped.
    let other = |random: &mut Random| loop {
        let b = kind(random);
        if b.colour != a.colour && b.shape != a.shape {
            return b;
        }
    };
    match random.below(100) {
        0..15 => Caption::One(a),
        15..50 => Caption::Pair(a, other(random)),
        50..80 => Caption::Related(a, *random.choose(&Relation::ALL), other(random)),
        _ => Caption::Count(2 + random.below(2), a),
    }
}

fn sample_scene(caption: &Caption, random: &mut Random) -> Scene {
    loop {
        let mut objects = Vec::new();
        for kind in caption.kinds() {
            objects.extend((0..ATTEMPTS).find_map(|_| place(kind, &objects, random)));
        }
        let complete = objects.len() == caption.kinds().len();
        let related = match *caption {
            Caption::Related(_, relation, _) => complete && relation.holds(centre(&objects[0]), centre(&objects[1])),
            _ => complete,
        };
        if related {
            let ground = 225 + random.below(26) as u8;
            return Scene { objects, ground, noise_seed: random.below(usize::MAX) as u64 };
        }
    }
}

fn centre(object: &Object) -> (f64, f64) {
    (object.x, object.y)
}

/// An object that touches neither the border nor the others.
fn place(kind: Kind, others: &[Object], random: &mut Random) -> Option<Object> {
    let radius = random.between(8., 11.5);
    let (low, high) = (radius + 1., SIDE as f64 - radius - 1.);
    let object = Object { kind, radius, x: random.between(low, high), y: random.between(low, high) };
    others.iter().all(|other| !touch(&object, other)).then_some(object)
}

/// Whether the squares around two objects, with a pixel between them, overlap.
fn touch(a: &Object, b: &Object) -> bool {
    let reach = a.radius + b.radius + 1.;
    (a.x - b.x).abs() < reach && (a.y - b.y).abs() < reach
}

/// Nearly the same caption, which the scene does not fit, and nearly the same scene, which does: attributes swapped, the
/// relation reversed, the count changed, or one attribute of a single object. In the caption's split, so that a held-out
/// caption is no negative in training; `None` when the scene has no room.
pub fn hard_negative(caption: &Caption, scene: &Scene, random: &mut Random) -> Option<(Caption, Scene)> {
    let recoloured = |kinds: &[Kind]| -> Vec<Object> {
        scene.objects.iter().zip(kinds).map(|(object, kind)| Object { kind: *kind, ..*object }).collect()
    };
    let swap = |a: Kind, b: Kind| (Kind { colour: b.colour, ..a }, Kind { colour: a.colour, ..b });
    let (other, objects) = match *caption {
        Caption::One(kind) => {
            let shapes = Shape::ALL.map(|shape| Kind { shape, ..kind });
            let colours = Colour::ALL.map(|colour| Kind { colour, ..kind });
            let all: Vec<_> = shapes.into_iter().chain(colours).filter(|other| *other != kind).collect();
            let fitting: Vec<_> =
                all.into_iter().filter(|k| Split::of(&Caption::One(*k)) == Split::of(caption)).collect();
            let other = *(!fitting.is_empty()).then(|| random.choose(&fitting))?;
            (Caption::One(other), recoloured(&[other]))
        }
        Caption::Pair(a, b) => {
            let (a, b) = swap(a, b);
            (Caption::Pair(a, b), recoloured(&[a, b]))
        }
        Caption::Related(a, relation, b) if random.below(2) == 0 => {
            let (a, b) = swap(a, b);
            (Caption::Related(a, relation, b), recoloured(&[a, b]))
        }
        Caption::Related(a, relation, b) => {
            let [first, second] = scene.objects[..] else { return None };
            let at = |object: Object, place: Object| Object { x: place.x, y: place.y, ..object };
            let objects = vec![at(first, second), at(second, first)];
            let fits_in = |o: &Object| {
                let low = o.radius + 1.;
                let high = SIDE as f64 - low;
                (low..=high).contains(&o.x) && (low..=high).contains(&o.y)
            };
            if !objects.iter().all(fits_in) {
                return None;
            }
            (Caption::Related(a, relation.reversed(), b), objects)
        }
        Caption::Count(n, kind) => {
            let mut objects = scene.objects.clone();
            if n == 3 || random.below(2) == 0 {
                objects.remove(random.below(objects.len()));
            } else {
                objects.push((0..ATTEMPTS).find_map(|_| place(kind, &objects, random))?);
            }
            let other = if objects.len() == 1 { Caption::One(kind) } else { Caption::Count(objects.len(), kind) };
            (other, objects)
        }
    };
    if Split::of(&other) != Split::of(caption) {
        return None;
    }
    Some((other, Scene { objects, noise_seed: random.below(usize::MAX) as u64, ..*scene }))
}
