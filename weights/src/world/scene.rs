use host_demo::Rgb;

use super::Random;

/// Width and height of every picture, in pixels.
pub const SIDE: usize = 64;

/// The colour of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Colour {
    Red,
    Green,
    Blue,
    Yellow,
    Purple,
    Orange,
}

impl Colour {
    /// Every colour.
    pub const ALL: [Self; 6] = [Self::Red, Self::Green, Self::Blue, Self::Yellow, Self::Purple, Self::Orange];

    /// Its word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Red => "red",
            Self::Green => "green",
            Self::Blue => "blue",
            Self::Yellow => "yellow",
            Self::Purple => "purple",
            Self::Orange => "orange",
        }
    }

    /// As drawn.
    pub fn rgb(self) -> [u8; 3] {
        match self {
            Self::Red => [220, 40, 40],
            Self::Green => [40, 170, 60],
            Self::Blue => [40, 80, 220],
            Self::Yellow => [235, 215, 40],
            Self::Purple => [145, 50, 190],
            Self::Orange => [245, 140, 30],
        }
    }
}

/// The shape of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Shape {
    Circle,
    Square,
    Triangle,
    Cross,
}

impl Shape {
    /// Every shape.
    pub const ALL: [Self; 4] = [Self::Circle, Self::Square, Self::Triangle, Self::Cross];

    /// Its word for one.
    pub fn name(self) -> &'static str {
        match self {
            Self::Circle => "circle",
            Self::Square => "square",
            Self::Triangle => "triangle",
            Self::Cross => "cross",
        }
    }

    /// Its word for several.
    pub fn plural(self) -> &'static str {
        match self {
            Self::Circle => "circles",
            Self::Square => "squares",
            Self::Triangle => "triangles",
            Self::Cross => "crosses",
        }
    }

    /// Left, top, right and bottom of the shape of radius 1 around the origin.
    pub fn extent(self) -> [f64; 4] {
        match self {
            Self::Circle | Self::Cross => [-1., -1., 1., 1.],
            Self::Square | Self::Triangle => [-0.9, -0.9, 0.9, 0.9],
        }
    }

    /// Whether a point is inside the shape of radius 1 around the origin; y points down.
    pub fn contains(self, x: f64, y: f64) -> bool {
        let [left, top, right, bottom] = self.extent();
        let within = (left..=right).contains(&x) && (top..=bottom).contains(&y);
        within
            && match self {
                Self::Circle => x * x + y * y <= 1.,
                Self::Square => true,
                // The apex is in the middle of the top.
                Self::Triangle => x.abs() <= right * (y - top) / (bottom - top),
                Self::Cross => x.abs().min(y.abs()) <= 1. / 3.,
            }
    }
}

/// What an object is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Kind {
    /// Its colour.
    pub colour: Colour,
    /// Its shape.
    pub shape: Shape,
}

/// An object in its place, in pixels.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Object {
    /// What it is.
    pub kind: Kind,
    /// Column of its centre.
    pub x: f64,
    /// Row of its centre.
    pub y: f64,
    /// Of the circle that a cross or circle of this size fills.
    pub radius: f64,
}

impl Object {
    /// (cx, cy, w, h) of its bounding box, in shares of the picture.
    pub fn bounding_box(&self) -> [f32; 4] {
        let [left, top, right, bottom] = self.kind.shape.extent().map(|v| v * self.radius / SIDE as f64);
        let (x, y) = (self.x / SIDE as f64, self.y / SIDE as f64);
        [x + (left + right) / 2., y + (top + bottom) / 2., right - left, bottom - top].map(|v| v as f32)
    }
}

/// What a picture shows.
#[derive(Clone, Debug, PartialEq)]
pub struct Scene {
    /// One to three objects that do not touch.
    pub objects: Vec<Object>,
    /// Brightness of the ground.
    pub ground: u8,
    /// Of the noise on every pixel.
    pub noise_seed: u64,
}

impl Scene {
    /// The picture, [`SIDE`] pixels wide and high.
    pub fn draw(&self) -> Rgb {
        /// Samples of a pixel in each direction, for smooth edges.
        const SAMPLES: usize = 4;
        /// Standard deviation of the noise, of 255.
        const NOISE: f32 = 2.;
        let mut noise = Random::new(self.noise_seed, 0);
        let mut pixels = Vec::with_capacity(SIDE * SIDE * 3);
        for (row, column) in (0..SIDE).flat_map(|row| (0..SIDE).map(move |column| (row, column))) {
            let mut sum = [0f64; 3];
            for sample in 0..SAMPLES * SAMPLES {
                let at = |pixel: usize, i: usize| pixel as f64 + (i as f64 + 0.5) / SAMPLES as f64;
                let (x, y) = (at(column, sample % SAMPLES), at(row, sample / SAMPLES));
                let hit = self.objects.iter().find(|object| {
                    object.kind.shape.contains((x - object.x) / object.radius, (y - object.y) / object.radius)
                });
                let colour = hit.map_or([self.ground; 3], |object| object.kind.colour.rgb());
                (0..3).for_each(|c| sum[c] += f64::from(colour[c]));
            }
            let grain = NOISE * noise.normal();
            let value = |sum: f64| (sum / (SAMPLES * SAMPLES) as f64) as f32 + grain;
            pixels.extend(sum.map(|sum| value(sum).round().clamp(0., 255.) as u8));
        }
        Rgb { width: SIDE as u32, height: SIDE as u32, pixels }
    }
}
