use std::path::{Path, PathBuf};

use host_demo::Rgb;
use image::imageops::FilterType;
use image::{ImageReader, Limits};

use crate::world::Scene;
use crate::{Error, Result};

/// A picture that is drawn or read when it is needed.
#[derive(Clone, Debug)]
pub enum Picture {
    /// Drawn.
    Scene {
        /// No other picture has it.
        name: String,
        /// What it shows.
        scene: Scene,
    },
    /// A PNG or JPEG file.
    File(PathBuf),
}

impl Picture {
    /// What distinguishes it from others, a changed file from what it was.
    pub fn name(&self) -> Result<String> {
        match self {
            Self::Scene { name, .. } => Ok(name.clone()),
            Self::File(path) => {
                let facts = std::fs::metadata(path).map_err(|e| Error::file(path, e))?;
                let changed = facts.modified().ok().and_then(|t| t.duration_since(std::time::UNIX_EPOCH).ok());
                Ok(format!("{} {} {:?}", path.display(), facts.len(), changed))
            }
        }
    }

    /// Its pixels, stretched to this size: boxes in shares of the picture stay right.
    pub fn pixels(&self, width: u32, height: u32) -> Result<Rgb> {
        let picture = match self {
            Self::Scene { scene, .. } => scene.draw(),
            Self::File(path) => read(path)?,
        };
        if (picture.width, picture.height) == (width, height) {
            return Ok(picture);
        }
        let (w, h) = (picture.width, picture.height);
        let buffer = image::RgbImage::from_raw(w, h, picture.pixels).expect("three bytes a pixel");
        let pixels = image::imageops::resize(&buffer, width, height, FilterType::CatmullRom).into_raw();
        Ok(Rgb { width, height, pixels })
    }
}

/// A PNG or JPEG of at most 1 GiB when decoded.
pub fn read(path: &Path) -> Result<Rgb> {
    let mut reader =
        ImageReader::open(path).and_then(ImageReader::with_guessed_format).map_err(|e| Error::file(path, e))?;
    let mut limits = Limits::default();
    limits.max_alloc = Some(1 << 30);
    reader.limits(limits);
    let image = reader.decode().map_err(|e| Error::file(path, format!("not a readable PNG or JPEG: {e}")))?;
    if image.color().has_alpha() && image.to_rgba8().pixels().any(|pixel| pixel.0[3] != u8::MAX) {
        return Err(Error::file(path, "the picture has transparent pixels; put it on a background first"));
    }
    let rgb = image.into_rgb8();
    Ok(Rgb { width: rgb.width(), height: rgb.height(), pixels: rgb.into_raw() })
}

/// Width and height of a picture, from its header.
pub fn size(path: &Path) -> Result<(u32, u32)> {
    let reader =
        ImageReader::open(path).and_then(ImageReader::with_guessed_format).map_err(|e| Error::file(path, e))?;
    reader.into_dimensions().map_err(|e| Error::file(path, format!("not a readable PNG or JPEG: {e}")))
}
