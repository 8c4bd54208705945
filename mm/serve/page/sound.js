// Sound from the microphone -> a WAV file: one channel, 16 bits, 16 kHz, which is what speech needs.

const RATE = 16_000;

/** Why a device cannot be used, in plain words. */
export function deviceTrouble(error, device) {
  if (error.name === "NotAllowedError") return `The browser does not let this page use the ${device}. Its address bar has the switch.`;
  if (error.name === "NotFoundError") return `There is no ${device} here.`;
  if (error.name === "NotReadableError") return `Another program uses the ${device}.`;
  return `The ${device} does not work: ${error.message}`;
}

/** `await Recorder.start(onlevel)`, then `await stop()` for the file, or `discard()`. */
export class Recorder {
  /** `onlevel(loudness, seconds)` is called as sound comes in, loudness from 0 to 1. Throws what getUserMedia does. */
  static async start(onlevel) {
    const stream = await navigator.mediaDevices.getUserMedia({ audio: { channelCount: 1 } });
    const context = new AudioContext();
    try {
      await context.audioWorklet.addModule(new URL("worklet.js", import.meta.url));
      return new Recorder(stream, context, onlevel);
    } catch (error) {
      release(stream, context);
      throw error;
    }
  }

  constructor(stream, context, onlevel) {
    this.stream = stream;
    this.context = context;
    this.blocks = [];
    this.length = 0;
    const node = new AudioWorkletNode(context, "blocks", { numberOfOutputs: 0 });
    node.port.onmessage = ({ data }) => {
      this.blocks.push(data);
      this.length += data.length;
      onlevel(loudness(data), this.length / context.sampleRate);
    };
    context.createMediaStreamSource(stream).connect(node);
  }

  discard() {
    release(this.stream, this.context);
  }

  /** Ends the recording -> File. */
  async stop() {
    const rate = this.context.sampleRate;
    release(this.stream, this.context);
    if (!this.length) throw new Error("The microphone gave no sound.");
    const samples = new Float32Array(this.length);
    let at = 0;
    for (const block of this.blocks) {
      samples.set(block, at);
      at += block.length;
    }
    return new File([wav(await resampled(samples, rate), RATE)], "recording.wav", { type: "audio/wav" });
  }
}

function release(stream, context) {
  for (const track of stream.getTracks()) track.stop();
  context.close();
}

/** 0 for -60 dB and less, 1 for full scale. */
function loudness(block) {
  const power = block.reduce((sum, value) => sum + value * value, 0) / block.length;
  return Math.min(1, Math.max(0, 1 + Math.log10(power + 1e-12) / 6));
}

/** The browser's own resampler. */
async function resampled(samples, rate) {
  const offline = new OfflineAudioContext(1, Math.ceil((samples.length * RATE) / rate), RATE);
  const buffer = offline.createBuffer(1, samples.length, rate);
  buffer.copyToChannel(samples, 0);
  const source = new AudioBufferSourceNode(offline, { buffer });
  source.connect(offline.destination);
  source.start();
  return (await offline.startRendering()).getChannelData(0);
}

/** Samples from -1 to 1 -> the bytes of a WAV file of 16-bit integers. */
function wav(samples, rate) {
  const view = new DataView(new ArrayBuffer(44 + 2 * samples.length));
  const letters = (at, text) => [...text].forEach((letter, n) => view.setUint8(at + n, letter.charCodeAt(0)));
  const size = 2 * samples.length;
  letters(0, "RIFF");
  view.setUint32(4, 36 + size, true);
  letters(8, "WAVEfmt ");
  view.setUint32(16, 16, true); // bytes of this chunk
  view.setUint16(20, 1, true); // integers
  view.setUint16(22, 1, true); // channels
  view.setUint32(24, rate, true);
  view.setUint32(28, 2 * rate, true); // bytes a second
  view.setUint16(32, 2, true); // bytes a sample of all channels
  view.setUint16(34, 16, true); // bits
  letters(36, "data");
  view.setUint32(40, size, true);
  samples.forEach((value, n) => view.setInt16(44 + 2 * n, Math.max(-1, Math.min(1, value)) * 0x7fff, true));
  return view.buffer;
}
