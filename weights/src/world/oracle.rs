use host_demo::Rgb;

use super::{Colour, Kind, Shape};

/// An object that was found in a picture.
#[derive(Clone, Debug, PartialEq)]
pub struct Seen {
    /// What it is; `None` when it is like none of the shapes.
    pub kind: Option<Kind>,
    /// Middle of its bounding box, in pixels: column, row.
    pub centre: (f64, f64),
    /// Pixels.
    pub area: usize,
}

/// Smaller spots are dirt.
const LEAST_AREA: usize = 36;
/// Least intersection over union with the template of a shape.
const LEAST_FIT: f64 = 0.75;
/// Share of a colour's distance from the ground at which a pixel has that colour.
const LEAST_COLOUR: f64 = 0.5;

/// The objects in a picture: connected pixels of one colour, each named by the shape whose template, stretched over its
/// bounding box, covers it best.
pub fn see(picture: &Rgb) -> Vec<Seen> {
    let (width, height) = (picture.width as usize, picture.height as usize);
    let ground = ground(picture);
    let colours: Vec<Option<Colour>> = picture.pixels.chunks(3).map(|pixel| colour(pixel, ground)).collect();
    let mut visited = vec![false; width * height];
    let mut seen = Vec::new();
    for start in 0..width * height {
        let Some(colour) = colours[start].filter(|_| !visited[start]) else { continue };
        let mut component = Vec::new();
        let mut open = vec![start];
        visited[start] = true;
        while let Some(at) = open.pop() {
            component.push(at);
            let (x, y) = (at % width, at / width);
            let neighbours = [
                (x > 0).then(|| at - 1),
                (x + 1 < width).then(|| at + 1),
                (y > 0).then(|| at - width),
                (y + 1 < height).then(|| at + width),
            ];
            for next in neighbours.into_iter().flatten() {
                if !visited[next] && colours[next] == Some(colour) {
                    visited[next] = true;
                    open.push(next);
                }
            }
        }
        if component.len() >= LEAST_AREA {
            seen.push(name(&component, width, colour));
        }
    }
    seen
}

/// The median of each channel: objects cover less than half of a picture.
fn ground(picture: &Rgb) -> [f64; 3] {
    [0, 1, 2].map(|channel| {
        let mut values: Vec<u8> = picture.pixels.iter().skip(channel).step_by(3).copied().collect();
        let middle = values.len() / 2;
        f64::from(*values.select_nth_unstable(middle).1)
    })
}

/// The colour towards which a pixel lies from the ground, when it is far enough on the way. Edges are mixed with the ground:
/// they have their object's direction.
fn colour(pixel: &[u8], ground: [f64; 3]) -> Option<Colour> {
    let from_ground = |rgb: &[u8]| [0, 1, 2].map(|c| f64::from(rgb[c]) - ground[c]);
    let dot = |a: [f64; 3], b: [f64; 3]| (0..3).map(|c| a[c] * b[c]).sum::<f64>();
    let v = from_ground(pixel);
    let length = dot(v, v).sqrt();
    let similarity = |colour: &Colour| {
        let p = from_ground(&colour.rgb());
        dot(v, p) / (length * dot(p, p).sqrt() + 1e-9)
    };
    let nearest = Colour::ALL.into_iter().max_by(|a, b| similarity(a).total_cmp(&similarity(b)))?;
    let p = from_ground(&nearest.rgb());
    (similarity(&nearest) > 0.9 && dot(v, p) > LEAST_COLOUR * dot(p, p)).then_some(nearest)
}

fn name(component: &[usize], width: usize, colour: Colour) -> Seen {
    let columns = component.iter().map(|at| at % width);
    let rows = component.iter().map(|at| at / width);
    let (left, right) = (columns.clone().min().unwrap_or(0), columns.max().unwrap_or(0) + 1);
    let (top, bottom) = (rows.clone().min().unwrap_or(0), rows.max().unwrap_or(0) + 1);
    let (box_width, box_height) = (right - left, bottom - top);
    let mut inside = vec![false; box_width * box_height];
    component.iter().for_each(|at| inside[(at / width - top) * box_width + at % width - left] = true);
    let fit = |shape: Shape| {
        let [x0, y0, x1, y1] = shape.extent();
        let (mut both, mut either) = (0, 0);
        for (index, filled) in inside.iter().enumerate() {
            let share = |at: usize, size: usize| (at as f64 + 0.5) / size as f64;
            let x = x0 + share(index % box_width, box_width) * (x1 - x0);
            let y = y0 + share(index / box_width, box_height) * (y1 - y0);
            let template = shape.contains(x, y);
            both += usize::from(*filled && template);
            either += usize::from(*filled || template);
        }
        f64::from(both as u32) / f64::from(either as u32)
    };
    let shape = Shape::ALL.into_iter().max_by(|a, b| fit(*a).total_cmp(&fit(*b))).expect("there are shapes");
    // Objects of the world are about as wide as they are high; two that have grown together are not.
    let long = box_width.max(box_height) as f64 / box_width.min(box_height) as f64 > 1.5;
    let kind = (fit(shape) >= LEAST_FIT && !long).then_some(Kind { colour, shape });
    let centre = ((left + right) as f64 / 2., (top + bottom) as f64 / 2.);
    Seen { kind, centre, area: component.len() }
}
