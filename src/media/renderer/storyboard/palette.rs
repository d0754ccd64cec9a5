//! The colours of a scene, and how one scene's blend into the next's.

/// Red, green, blue, each 0.0 to 1.0 (gamma-encoded, as shown).
pub type Rgb = [f32; 3];

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Palette {
    /// The sky at the zenith, half way down, and where it meets the land.
    pub top: Rgb,
    pub middle: Rgb,
    pub horizon: Rgb,
    /// The sun or moon, and its light on all else.
    pub glow: Rgb,
    /// The farthest and the nearest layer of land.
    pub far: Rgb,
    pub near: Rgb,
    /// The emphasised word.
    pub accent: Rgb,
    /// 0.0 day to 1.0 night: stars, a moon, lit windows.
    pub night: f32,
    pub clouds: f32,
    pub aurora: f32,
    /// 1.0 cuts the sun into the bars of a synthwave sleeve.
    pub bars: f32,
}

/// One of the palettes that suit any prompt.
pub fn any(number: u64) -> Palette {
    let all = [DUSK, DAWN, NIGHT, AURORA, OCEAN, GOLD];
    all[(number % all.len() as u64) as usize]
}

#[inline]
pub fn mix(a: Rgb, b: Rgb, share: f32) -> Rgb {
    let share = share.clamp(0.0, 1.0);
    let between = |i: usize| a[i] + (b[i] - a[i]) * share;
    [between(0), between(1), between(2)]
}

/// The palette `share` of the way from one to another.
pub fn blend(a: &Palette, b: &Palette, share: f32) -> Palette {
    let number = |x: f32, y: f32| x + (y - x) * share.clamp(0.0, 1.0);
    Palette {
        top: mix(a.top, b.top, share),
        middle: mix(a.middle, b.middle, share),
        horizon: mix(a.horizon, b.horizon, share),
        glow: mix(a.glow, b.glow, share),
        far: mix(a.far, b.far, share),
        near: mix(a.near, b.near, share),
        accent: mix(a.accent, b.accent, share),
        night: number(a.night, b.night),
        clouds: number(a.clouds, b.clouds),
        aurora: number(a.aurora, b.aurora),
        bars: number(a.bars, b.bars),
    }
}

const fn rgb(hex: u32) -> Rgb {
    [channel(hex >> 16), channel(hex >> 8), channel(hex)]
}

const fn channel(value: u32) -> f32 {
    (value & 255) as f32 / 255.0
}

pub const DUSK: Palette = Palette {
    top: rgb(0x1b1440),
    middle: rgb(0x7a2f6b),
    horizon: rgb(0xff8f5a),
    glow: rgb(0xffd28a),
    far: rgb(0xa8476b),
    near: rgb(0x180f2b),
    accent: rgb(0xffc46b),
    night: 0.35,
    clouds: 0.75,
    aurora: 0.0,
    bars: 0.0,
};
pub const DAWN: Palette = Palette {
    top: rgb(0x3d4c86),
    middle: rgb(0xc0719a),
    horizon: rgb(0xffc3a0),
    glow: rgb(0xfff0c9),
    far: rgb(0xb4709a),
    near: rgb(0x2c1c44),
    accent: rgb(0xffd9a8),
    night: 0.1,
    clouds: 0.8,
    aurora: 0.0,
    bars: 0.0,
};
pub const DAY: Palette = Palette {
    top: rgb(0x1d63b8),
    middle: rgb(0x4f9fe0),
    horizon: rgb(0xcfeaf7),
    glow: rgb(0xfffbe6),
    far: rgb(0x6ea4cf),
    near: rgb(0x123a5c),
    accent: rgb(0xffe37a),
    night: 0.0,
    clouds: 0.9,
    aurora: 0.0,
    bars: 0.0,
};
pub const NIGHT: Palette = Palette {
    top: rgb(0x050716),
    middle: rgb(0x10204a),
    horizon: rgb(0x35508a),
    glow: rgb(0xdfe8ff),
    far: rgb(0x253a6b),
    near: rgb(0x04060f),
    accent: rgb(0x9fc4ff),
    night: 1.0,
    clouds: 0.35,
    aurora: 0.0,
    bars: 0.0,
};
pub const AURORA: Palette = Palette {
    top: rgb(0x030a1c),
    middle: rgb(0x0b2746),
    horizon: rgb(0x1f6a72),
    glow: rgb(0xd5fff0),
    far: rgb(0x174a5a),
    near: rgb(0x020a12),
    accent: rgb(0x7dffc4),
    night: 1.0,
    clouds: 0.2,
    aurora: 1.0,
    bars: 0.0,
};
pub const NEON: Palette = Palette {
    top: rgb(0x0b0524),
    middle: rgb(0x3c0d63),
    horizon: rgb(0xff3f8e),
    glow: rgb(0xffd166),
    far: rgb(0x5a1a7f),
    near: rgb(0x090318),
    accent: rgb(0x4df3ff),
    night: 0.8,
    clouds: 0.3,
    aurora: 0.0,
    bars: 1.0,
};
pub const EMBER: Palette = Palette {
    top: rgb(0x12060a),
    middle: rgb(0x4d0f12),
    horizon: rgb(0xe2561f),
    glow: rgb(0xffb347),
    far: rgb(0x6b1d17),
    near: rgb(0x0d0405),
    accent: rgb(0xffb04d),
    night: 0.55,
    clouds: 0.8,
    aurora: 0.0,
    bars: 0.0,
};
pub const GOLD: Palette = Palette {
    top: rgb(0x2e4a7d),
    middle: rgb(0xc98a52),
    horizon: rgb(0xffdd9a),
    glow: rgb(0xfff3cf),
    far: rgb(0xc98b55),
    near: rgb(0x3d1a1c),
    accent: rgb(0xffe28f),
    night: 0.05,
    clouds: 0.45,
    aurora: 0.0,
    bars: 0.0,
};
pub const FROST: Palette = Palette {
    top: rgb(0x1f3a68),
    middle: rgb(0x5c8fc0),
    horizon: rgb(0xdcecf6),
    glow: rgb(0xffffff),
    far: rgb(0x8fb4d3),
    near: rgb(0x16304f),
    accent: rgb(0xbfe9ff),
    night: 0.15,
    clouds: 0.8,
    aurora: 0.0,
    bars: 0.0,
};
pub const STORM: Palette = Palette {
    top: rgb(0x10182a),
    middle: rgb(0x2f4258),
    horizon: rgb(0x7f95a3),
    glow: rgb(0xcfe0e8),
    far: rgb(0x4a6071),
    near: rgb(0x0b131d),
    accent: rgb(0x9fe0ff),
    night: 0.4,
    clouds: 1.0,
    aurora: 0.0,
    bars: 0.0,
};
pub const GREEN: Palette = Palette {
    top: rgb(0x0f3a4a),
    middle: rgb(0x3d8a7d),
    horizon: rgb(0xd8efb4),
    glow: rgb(0xfff8cf),
    far: rgb(0x5f9f86),
    near: rgb(0x072421),
    accent: rgb(0xe4ff8f),
    night: 0.1,
    clouds: 0.6,
    aurora: 0.0,
    bars: 0.0,
};
pub const OCEAN: Palette = Palette {
    top: rgb(0x0b2d5e),
    middle: rgb(0x1f86a8),
    horizon: rgb(0xbdf0e0),
    glow: rgb(0xfff6d6),
    far: rgb(0x2f9fb0),
    near: rgb(0x05243f),
    accent: rgb(0x8ff5e6),
    night: 0.1,
    clouds: 0.8,
    aurora: 0.0,
    bars: 0.0,
};
pub const NOIR: Palette = Palette {
    top: rgb(0x0b0c0e),
    middle: rgb(0x34373c),
    horizon: rgb(0xa9adb2),
    glow: rgb(0xf4f4f4),
    far: rgb(0x5a5e64),
    near: rgb(0x08090a),
    accent: rgb(0xffffff),
    night: 0.5,
    clouds: 0.7,
    aurora: 0.0,
    bars: 0.0,
};
