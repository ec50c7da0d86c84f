//! Pictures: rows of RGB bytes, and PNG files that carry the settings that made them.

use std::path::Path;

use candle_core::{DType, Device, Tensor};

use crate::output::write_whole;
use crate::{Error, Result};

/// A picture in 8-bit RGB.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rgb {
    /// Pixels in a row.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// Row by row, three bytes a pixel.
    pub pixels: Vec<u8>,
}

impl Rgb {
    /// More than any picture here takes: 1 GiB.
    const MOST_BYTES: u64 = 1 << 30;

    /// A picture of one colour. Fails when it would be larger than memory should be asked for.
    pub fn filled(width: u32, height: u32, colour: [u8; 3]) -> Result<Self> {
        let bytes = (u64::from(width) * u64::from(height)).saturating_mul(3);
        if bytes > Self::MOST_BYTES {
            return Err(Error::Request(format!("a picture of {width}x{height} pixels is too large")));
        }
        Ok(Self { width, height, pixels: colour.repeat(bytes as usize / 3) })
    }

    /// One decoded image `[3, H, W]` in [-1, 1]; NaN is refused.
    pub fn from_tensor(image: &Tensor) -> Result<Self> {
        let (_, height, width) = image.dims3()?;
        // Rounded as diffusers does: (x / 2 + 0.5) in [0, 1], times 255.
        let bytes = ((image.to_dtype(DType::F32)?.affine(0.5, 0.5)?.clamp(0f32, 1f32)? * 255.)?).round()?;
        let rows = bytes.permute((1, 2, 0))?.flatten_all()?.to_vec1::<f32>()?;
        if rows.iter().any(|value| value.is_nan()) {
            return Err(Error::Request("the decoded image holds NaN: the run's numbers went out of range".into()));
        }
        let pixels = rows.into_iter().map(|v| v as u8).collect();
        Ok(Self { width: width as u32, height: height as u32, pixels })
    }

    /// Reads a PNG of any colour type and depth. Transparent pixels are refused: what would shine through is not known.
    pub fn load_png(path: &Path) -> Result<Self> {
        let failed = |e: png::DecodingError| Error::file(path, format!("not a readable PNG: {e}"));
        let file = std::fs::File::open(path).map_err(|e| Error::file(path, e))?;
        let limits = png::Limits { bytes: Self::MOST_BYTES as usize };
        let mut decoder = png::Decoder::new_with_limits(std::io::BufReader::new(file), limits);
        decoder.set_transformations(png::Transformations::normalize_to_color8());
        let mut reader = decoder.read_info().map_err(failed)?;
        let size = reader.output_buffer_size().filter(|size| *size as u64 <= Self::MOST_BYTES);
        let mut samples = vec![0; size.ok_or_else(|| Error::file(path, "the picture is too large"))?];
        let frame = reader.next_frame(&mut samples).map_err(failed)?;
        samples.truncate(frame.buffer_size());
        let channels = frame.color_type.samples();
        if channels % 2 == 0 && samples.chunks(channels).any(|pixel| pixel[channels - 1] != u8::MAX) {
            return Err(Error::file(path, "the picture has transparent pixels; put it on a background first"));
        }
        let pixels = match channels {
            1 | 2 => samples.chunks(channels).flat_map(|pixel| [pixel[0]; 3]).collect(),
            _ => samples.chunks(channels).flat_map(|pixel| [pixel[0], pixel[1], pixel[2]]).collect(),
        };
        Ok(Self { width: frame.width, height: frame.height, pixels })
    }

    /// `[3, H, W]` in [-1, 1], as diffusers' VaeImageProcessor: `2 (x / 255) - 1`.
    pub fn to_tensor(&self, device: &Device) -> Result<Tensor> {
        let values: Vec<f32> = self.pixels.iter().map(|value| 2. * (f32::from(*value) / 255.) - 1.).collect();
        let rows = Tensor::from_vec(values, (self.height as usize, self.width as usize, 3), device)?;
        Ok(rows.permute((2, 0, 1))?.contiguous()?)
    }

    /// The pixel in column `x` of row `y`. Panics outside.
    pub fn at(&self, x: u32, y: u32) -> [u8; 3] {
        let start = self.start(x, y);
        [self.pixels[start], self.pixels[start + 1], self.pixels[start + 2]]
    }

    /// Gives the pixel in column `x` of row `y` a colour. Panics outside.
    pub fn set(&mut self, x: u32, y: u32, colour: [u8; 3]) {
        let start = self.start(x, y);
        self.pixels[start..start + 3].copy_from_slice(&colour);
    }

    fn start(&self, x: u32, y: u32) -> usize {
        3 * (y as usize * self.width as usize + x as usize)
    }

    /// Draws `picture`, each of its pixels as a square of side `scale`, with its corner at `(left, top)`. Panics outside.
    pub fn paste(&mut self, picture: &Self, (left, top): (u32, u32), scale: u32) {
        for y in 0..picture.height * scale {
            let mut target = self.start(left, top + y);
            for x in 0..picture.width * scale {
                self.pixels[target..target + 3].copy_from_slice(&picture.at(x / scale, y / scale));
                target += 3;
            }
        }
    }

    /// Writes a PNG with text entries; the file appears whole or not at all.
    pub fn save_png(&self, path: &Path, texts: &[(&str, String)]) -> Result<()> {
        let encode = || -> std::result::Result<Vec<u8>, png::EncodingError> {
            let mut bytes = Vec::new();
            let mut encoder = png::Encoder::new(&mut bytes, self.width, self.height);
            encoder.set_color(png::ColorType::Rgb);
            encoder.set_depth(png::BitDepth::Eight);
            for (key, text) in texts {
                encoder.add_itxt_chunk((*key).to_owned(), text.clone())?;
            }
            let mut writer = encoder.write_header()?;
            writer.write_image_data(&self.pixels)?;
            writer.finish()?;
            Ok(bytes)
        };
        write_whole(path, &encode().map_err(|e| Error::file(path, e))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_rounded_and_clamped_and_nan_is_refused() {
        let image = |values: [f32; 6]| Tensor::from_slice(&values, (3, 1, 2), &Device::Cpu).unwrap();
        // Channels first in, pixels first out.
        let picture = Rgb::from_tensor(&image([-1., 1., 0., -7., 7., 0.5])).unwrap();
        assert_eq!(picture, Rgb { width: 2, height: 1, pixels: vec![0, 128, 255, 255, 0, 191] });
        let message = Rgb::from_tensor(&image([0., f32::NAN, 0., 0., 0., 0.])).unwrap_err().to_string();
        assert!(message.contains("NaN"), "{message}");
    }

    /// Every colour type and depth that PNG has for these four pixels.
    #[test]
    fn every_kind_of_png_is_read() {
        let folder = std::env::temp_dir().join(format!("host-demo-png-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join("picture.png");
        let write = |colour: png::ColorType, depth: png::BitDepth, data: &[u8], palette: Option<Vec<u8>>| {
            let mut encoder = png::Encoder::new(std::fs::File::create(&path).unwrap(), 2, 1);
            encoder.set_color(colour);
            encoder.set_depth(depth);
            if let Some(palette) = palette {
                encoder.set_palette(palette);
            }
            encoder.write_header().unwrap().write_image_data(data).unwrap();
        };
        use png::{BitDepth as Depth, ColorType as Colour};
        let grey = vec![255, 255, 255, 0, 0, 0];
        for (colour, depth, data, palette, expected) in [
            (Colour::Rgb, Depth::Eight, vec![1, 2, 3, 4, 5, 6], None, vec![1, 2, 3, 4, 5, 6]),
            (Colour::Rgba, Depth::Eight, vec![1, 2, 3, 255, 4, 5, 6, 255], None, vec![1, 2, 3, 4, 5, 6]),
            (Colour::Grayscale, Depth::Eight, vec![255, 0], None, grey.clone()),
            (Colour::Grayscale, Depth::One, vec![0b1000_0000], None, grey.clone()),
            (Colour::Grayscale, Depth::Sixteen, vec![255, 255, 0, 0], None, grey.clone()),
            (Colour::GrayscaleAlpha, Depth::Eight, vec![255, 255, 0, 255], None, grey),
            (Colour::Indexed, Depth::Eight, vec![1, 0], Some(vec![9, 8, 7, 1, 2, 3]), vec![1, 2, 3, 9, 8, 7]),
        ] {
            write(colour, depth, &data, palette);
            assert_eq!(Rgb::load_png(&path).unwrap().pixels, expected, "{colour:?} {depth:?}");
        }
        write(Colour::Rgba, Depth::Eight, &[1, 2, 3, 255, 4, 5, 6, 254], None);
        assert!(Rgb::load_png(&path).unwrap_err().to_string().contains("transparent"));
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, &whole[..whole.len() / 2]).unwrap();
        assert!(Rgb::load_png(&path).unwrap_err().to_string().contains("not a readable PNG"));
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn pixels_to_numbers_and_back() {
        let picture = Rgb { width: 2, height: 1, pixels: vec![0, 255, 51, 102, 7, 200] };
        let tensor = picture.to_tensor(&Device::Cpu).unwrap();
        assert_eq!(tensor.dims(), [3, 1, 2]);
        assert_eq!(tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap()[..3], [-1., 2. * (102. / 255.) - 1., 1.]);
        assert_eq!(Rgb::from_tensor(&tensor).unwrap(), picture);
    }

    #[test]
    fn a_picture_too_large_for_memory_is_refused() {
        assert!(Rgb::filled(u32::MAX, u32::MAX, [0; 3]).unwrap_err().to_string().contains("too large"));
    }
}
