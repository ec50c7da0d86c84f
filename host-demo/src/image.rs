//! Pictures as PNG files that carry the settings that made them.

use std::path::Path;

use candle_core::{DType, Tensor};

use crate::output::write_whole;
use crate::{Error, Result};

/// One decoded image `[3, H, W]` in [-1, 1] as rows of RGB bytes, with its width and height.
pub fn to_rgb(image: &Tensor) -> Result<(Vec<u8>, u32, u32)> {
    let (_, height, width) = image.dims3()?;
    // Rounded as diffusers does: (x / 2 + 0.5) in [0, 1], times 255.
    let bytes = ((image.to_dtype(DType::F32)?.affine(0.5, 0.5)?.clamp(0f32, 1f32)? * 255.)?).round()?;
    let rows = bytes.permute((1, 2, 0))?.flatten_all()?.to_vec1::<f32>()?;
    if rows.iter().any(|value| value.is_nan()) {
        return Err(Error::Request("the decoded image holds NaN: the run's numbers went out of range".into()));
    }
    Ok((rows.into_iter().map(|v| v as u8).collect(), width as u32, height as u32))
}

/// Writes a PNG with text entries; the file appears whole or not at all.
pub fn save_png(path: &Path, image: &Tensor, texts: &[(&str, String)]) -> Result<()> {
    let (pixels, width, height) = to_rgb(image)?;
    let encode = || -> std::result::Result<Vec<u8>, png::EncodingError> {
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, width, height);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        for (key, text) in texts {
            encoder.add_itxt_chunk((*key).to_owned(), text.clone())?;
        }
        let mut writer = encoder.write_header()?;
        writer.write_image_data(&pixels)?;
        writer.finish()?;
        Ok(bytes)
    };
    write_whole(path, &encode().map_err(|e| Error::file(path, e))?)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn values_are_rounded_and_clamped_and_nan_is_refused() {
        let image = |values: [f32; 6]| Tensor::from_slice(&values, (3, 1, 2), &Device::Cpu).unwrap();
        // Channels first in, pixels first out.
        let (bytes, width, height) = to_rgb(&image([-1., 1., 0., -7., 7., 0.5])).unwrap();
        assert_eq!((bytes, width, height), (vec![0, 128, 255, 255, 0, 191], 2, 1));
        assert!(to_rgb(&image([0., f32::NAN, 0., 0., 0., 0.])).unwrap_err().to_string().contains("NaN"));
    }
}
