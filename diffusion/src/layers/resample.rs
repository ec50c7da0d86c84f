use candle_core::Tensor;

use crate::Result;

/// Nearest-neighbour doubling of `[B, C, h, w]` to a target of `2 h` or `2 h - 1` rows (columns likewise): an odd target
/// belongs to a skip connection of odd size, where diffusers interpolates to that size. Its source index
/// `floor(i h / (2 h - 1))` equals `floor(i / 2)`, so the odd size is the doubled image without its last row.
pub(crate) fn upsample_nearest(x: &Tensor, (height, width): (usize, usize)) -> Result<Tensor> {
    let (b, c, h, w) = x.dims4()?;
    if height.div_ceil(2) != h || width.div_ceil(2) != w {
        return Err(crate::Error::Input(format!("cannot upsample {h}x{w} to {height}x{width}")));
    }
    let doubled = x.reshape((b, c, h, 1, w, 1))?.broadcast_as((b, c, h, 2, w, 2))?.contiguous()?;
    let doubled = doubled.reshape((b, c, 2 * h, 2 * w))?;
    Ok(doubled.narrow(2, 0, height)?.narrow(3, 0, width)?.contiguous()?)
}

/// Sums the up to four copies of each input value.
pub(crate) fn upsample_nearest_vjp(dy: &Tensor) -> Result<Tensor> {
    let (b, c, height, width) = dy.dims4()?;
    let (h, w) = (height.div_ceil(2), width.div_ceil(2));
    let dy = dy.pad_with_zeros(2, 0, 2 * h - height)?.pad_with_zeros(3, 0, 2 * w - width)?;
    Ok(dy.contiguous()?.reshape((b, c, h, 2, w, 2))?.sum(5)?.sum(3)?)
}
